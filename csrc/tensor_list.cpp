#include "tensor_list.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <new>

namespace {

struct TensorList {
  PyObject_HEAD
  std::vector<at::Tensor> tensors;
};

std::vector<at::Tensor>& tensors_of(PyObject* list) {
  return reinterpret_cast<TensorList*>(list)->tensors;
}

Py_ssize_t length(PyObject* list) {
  return static_cast<Py_ssize_t>(tensors_of(list).size());
}

PyObject* entry(PyObject* list, Py_ssize_t i) {
  HANDLE_TH_ERRORS
  if (i < 0 || i >= length(list)) {
    PyErr_SetString(PyExc_IndexError, "no such tensor in the list");
    return nullptr;
  }
  return THPVariable_Wrap(tensors_of(list)[static_cast<size_t>(i)]);
  END_HANDLE_TH_ERRORS
}

void die(PyObject* list) {
  tensors_of(list).~vector();
  Py_TYPE(list)->tp_free(list);
}

// Made at the first call; null with a Python error if Python refuses it.
PyTypeObject* type() {
  static PyTypeObject* const ready = [] {
    static PySequenceMethods sequence{};
    sequence.sq_length = length, sequence.sq_item = entry;
    static PyTypeObject made = {PyVarObject_HEAD_INIT(nullptr, 0)};
    made.tp_name = "fvae_kernels._C.TensorList", made.tp_doc = "Tensors without Python objects.";
    made.tp_basicsize = sizeof(TensorList), made.tp_flags = Py_TPFLAGS_DEFAULT;
    made.tp_dealloc = die, made.tp_as_sequence = &sequence;
    return PyType_Ready(&made) == 0 ? &made : nullptr;
  }();
  return ready;
}

}  // namespace

PyObject* tensor_list(std::vector<at::Tensor> tensors) {
  PyTypeObject* const of = type();
  PyObject* made = of ? of->tp_alloc(of, 0) : nullptr;
  if (made) new (&tensors_of(made)) std::vector<at::Tensor>(std::move(tensors));
  return made;
}

const std::vector<at::Tensor>* listed(PyObject* object) {
  return Py_TYPE(object) == type() ? &tensors_of(object) : nullptr;
}
