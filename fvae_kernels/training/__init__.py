"""How the objective reaches the gradient: masks, weights, hooks, trainers and logs."""
