// A step of a planned layer as one node of autograd.
#pragma once
#include <torch/csrc/python_headers.h>

// (step, base, *entries) -> (y, loss, terms), as `PlannedLayer.apply` of ops/_layer_plan.py.
PyObject* run_step(PyObject*, PyObject* const* arguments, Py_ssize_t count);
