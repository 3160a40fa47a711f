"""How the objective enters the gradient: masks, weights, hooks, trainers and logs."""
