// The Python module. Loading it registers the kernels; its two functions replace many calls of PyTorch's in each step.
#include <ATen/ops/empty_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <string>

namespace {

// Calls `body` with each tensor of a sequence. False with a Python error if it is none.
template <typename Body>
bool for_each_tensor(PyObject* tensors, const Body& body) {
  THPObjectPtr items(PySequence_Fast(tensors, "expected a sequence of tensors"));
  if (!items) return false;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.get()); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(items.get(), i);
    if (!THPVariable_Check(item)) {
      PyErr_Format(PyExc_TypeError, "entry %zd is %s; expected a tensor", i, Py_TYPE(item)->tp_name);
      return false;
    }
    body(i, THPVariable_Unpack(item));
  }
  return true;
}

// dtype, device, shape and strides of each tensor, as bytes to compare.
PyObject* looks_of(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  std::string looks;
  const auto add = [&](int64_t value) { looks.append(reinterpret_cast<const char*>(&value), sizeof value); };
  const bool done = for_each_tensor(tensors, [&](Py_ssize_t, const at::Tensor& t) {
    add(static_cast<int64_t>(t.scalar_type())), add(static_cast<int64_t>(t.device().type())), add(t.device().index());
    add(t.dim());
    for (const int64_t size : t.sizes()) add(size);
    for (const int64_t stride : t.strides()) add(stride);
  });
  return done ? PyBytes_FromStringAndSize(looks.data(), static_cast<Py_ssize_t>(looks.size())) : nullptr;
  END_HANDLE_TH_ERRORS
}

// torch.empty_like of each tensor.
PyObject* empties_like(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  THPObjectPtr made(PyList_New(0));
  if (!made) return nullptr;
  const bool done = for_each_tensor(tensors, [&](Py_ssize_t, const at::Tensor& t) {
    THPObjectPtr one(THPVariable_Wrap(at::empty_like(t)));
    if (!one || PyList_Append(made.get(), one.get()) != 0) throw python_error();
  });
  return done ? made.release() : nullptr;
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"looks_of", looks_of, METH_O, "dtype, device, shape and strides of each tensor, as bytes to compare."},
    {"empties_like", empties_like, METH_O, "torch.empty_like of each tensor."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
