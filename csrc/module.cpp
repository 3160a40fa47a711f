// The Python module. Loading it registers the kernels; its functions replace many calls of PyTorch's in each step.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "step.h"
#include "tensor_list.h"

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

// Entries as bytes, which are quick to compare with those of another step.
template <typename Entries>
PyObject* bytes_of(const Entries& entries) {
  const auto* bytes = reinterpret_cast<const char*>(entries.data());
  return PyBytes_FromStringAndSize(bytes, static_cast<Py_ssize_t>(entries.size() * sizeof entries[0]));
}

using Looks = c10::SmallVector<int64_t, 256>;

// dtype, device, shape and strides of each tensor. False with a Python error if one is none.
bool looks_at(PyObject* tensors, Looks& looks) {
  const auto add = [&](int64_t value) { looks.push_back(value); };
  return for_each_tensor(tensors, [&](Py_ssize_t, const at::Tensor& t) {
    add(static_cast<int64_t>(t.scalar_type())), add(static_cast<int64_t>(t.device().type())), add(t.device().index());
    add(t.dim());
    looks.append(t.sizes().begin(), t.sizes().end());
    looks.append(t.strides().begin(), t.strides().end());
  });
}

// What `gather` finds in tensors, as bytes for `unchanged`. `gather` is false with a Python error.
template <typename Entries, bool (*gather)(PyObject*, Entries&)>
PyObject* noted(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  Entries entries;
  if (!gather(tensors, entries)) return nullptr;
  return bytes_of(entries);
  END_HANDLE_TH_ERRORS
}

// Whether `noted` gave these bytes and would give them again.
template <typename Entries, bool (*gather)(PyObject*, Entries&)>
PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !PyBytes_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "expected tensors, and the bytes that looks_of or addresses_of gave");
    return nullptr;
  }
  Entries entries;
  if (!gather(arguments[0], entries)) return nullptr;
  const auto size = static_cast<size_t>(PyBytes_GET_SIZE(arguments[1]));
  const char* before = PyBytes_AS_STRING(arguments[1]);
  return PyBool_FromLong(size == entries.size_in_bytes() && std::memcmp(before, entries.data(), size) == 0);
  END_HANDLE_TH_ERRORS
}

// What decides the path of x [..., D] and base [..., M], apart from the tokens: dtypes, devices, D, M, whether there is a
// row of base for each of x, and autocast's dtype, as bytes.
PyObject* kind_of(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !THPVariable_Check(arguments[0]) || !THPVariable_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "expected two tensors, x and base");
    return nullptr;
  }
  std::array<int64_t, 11> kind;
  int64_t* to = kind.data();
  const at::Tensor &x = THPVariable_Unpack(arguments[0]), &base = THPVariable_Unpack(arguments[1]);
  for (const at::Tensor* t : {&x, &base}) {
    const at::Device device = t->device();
    *to++ = static_cast<int64_t>(t->scalar_type());
    *to++ = static_cast<int64_t>(device.type()), *to++ = device.index();
    *to++ = t->dim() > 0 ? t->sizes().back() : -1;
  }
  const auto rows = [](const at::Tensor& t) { return t.sizes().slice(0, std::max<int64_t>(t.dim(), 1) - 1); };
  *to++ = x.dim() == base.dim() && rows(x) == rows(base);
  const auto type = x.device().type();
  const bool autocast = at::autocast::is_autocast_available(type) && at::autocast::is_autocast_enabled(type);
  *to++ = autocast, *to++ = autocast ? static_cast<int64_t>(at::autocast::get_autocast_dtype(type)) : 0;
  return bytes_of(kind);
  END_HANDLE_TH_ERRORS
}

// A seed from the default generator, on the device of a tensor.
PyObject* seed_like(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  if (!THPVariable_Check(tensor)) {
    PyErr_Format(PyExc_TypeError, "%s; expected a tensor", Py_TYPE(tensor)->tp_name);
    return nullptr;
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto options = THPVariable_Unpack(tensor).options().dtype(at::kLong);
  return THPVariable_Wrap(at::empty({}, options).random_(0, std::numeric_limits<int64_t>::max()));
  END_HANDLE_TH_ERRORS
}

// Bytes between the starts of two tensors in one piece of memory: what kernels that read vectors want.
constexpr size_t kAlignment = 128;

// A list of torch.empty_like of the tensors whose flag is True; they are dense and on one device. All of it is one piece
// of memory, since each piece costs the host a call of the allocator. Without a look for autograd, which has no part in it.
PyObject* empties_like(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2 || !PyTuple_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "expected tensors and a tuple of flags");
    return nullptr;
  }
  std::vector<const at::Tensor*> wanted;
  wanted.reserve(static_cast<size_t>(PyTuple_GET_SIZE(arguments[1])));
  size_t total = 0;
  const auto bytes = [](const at::Tensor& t) { return (t.nbytes() + kAlignment - 1) / kAlignment * kAlignment; };
  const bool done = for_each_tensor(arguments[0], [&](Py_ssize_t i, const at::Tensor& t) {
    if (i >= PyTuple_GET_SIZE(arguments[1]) || PyTuple_GET_ITEM(arguments[1], i) != Py_True) return;
    wanted.push_back(&t), total += bytes(t);
  });
  if (!done) return nullptr;
  std::vector<at::Tensor> made;
  if (wanted.empty()) return tensor_list(std::move(made));
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto options = at::TensorOptions().dtype(at::kByte).device(wanted[0]->device());
  const at::Tensor memory = at::empty({static_cast<int64_t>(total)}, options);
  made.reserve(wanted.size());
  size_t start = 0;
  for (const at::Tensor* t : wanted) {
    TORCH_CHECK(t->device() == memory.device(), "tensors on ", memory.device(), " and ", t->device());
    made.push_back(part_of(memory, t->dtype(), t->sizes(), t->strides(), static_cast<int64_t>(start / t->itemsize())));
    start += bytes(*t);
  }
  return tensor_list(std::move(made));
  END_HANDLE_TH_ERRORS
}

// A contiguous tensor of each dtype and shape in turn, (dtype, shape, dtype, shape, ...), on the device of a tensor.
PyObject* empties(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count < 1 || count % 2 == 0 || !THPVariable_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "expected a tensor, and pairs of a dtype and a shape");
    return nullptr;
  }
  const auto options = THPVariable_Unpack(arguments[0]).options();
  THPObjectPtr made(PyTuple_New(count / 2));
  if (!made) return nullptr;
  const at::AutoDispatchBelowADInplaceOrView below;
  for (Py_ssize_t i = 0; i < count / 2; ++i) {
    PyObject *dtype = arguments[2 * i + 1], *shape = arguments[2 * i + 2];
    if (!THPDtype_Check(dtype) || !PyTuple_Check(shape)) {
      PyErr_Format(PyExc_TypeError, "pair %zd is no dtype and tuple of sizes", i);
      return nullptr;
    }
    c10::SmallVector<int64_t, 5> sizes;
    for (Py_ssize_t d = 0; d < PyTuple_GET_SIZE(shape); ++d) {
      sizes.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d)));
      if (sizes.back() == -1 && PyErr_Occurred()) return nullptr;
    }
    PyObject* one = THPVariable_Wrap(at::empty(sizes, options.dtype(reinterpret_cast<THPDtype*>(dtype)->scalar_type)));
    if (!one) return nullptr;
    PyTuple_SET_ITEM(made.get(), i, one);
  }
  return made.release();
  END_HANDLE_TH_ERRORS
}

// The same memory in a tensor with a node of its own, which is no view.
PyObject* renewed(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  if (!THPVariable_Check(tensor)) {
    PyErr_Format(PyExc_TypeError, "%s; expected a tensor", Py_TYPE(tensor)->tp_name);
    return nullptr;
  }
  const at::Tensor& t = THPVariable_Unpack(tensor);
  return THPVariable_Wrap(at::_unsafe_view_symint(t, t.sym_sizes()));
  END_HANDLE_TH_ERRORS
}

PyObject* address_of(const at::Tensor& t) {
  PyObject* address = PyLong_FromVoidPtr(t.data_ptr());
  if (!address) throw python_error();
  return address;
}

PyObject* addresses_of(const std::vector<at::Tensor>& tensors) {
  THPObjectPtr made(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  if (!made) throw python_error();
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), address_of(tensors[i]));
  }
  return made.release();
}

using Addresses = c10::SmallVector<const void*, 32>;

// Where the data of each tensor begins. False with a Python error if one is none.
bool addresses_in(PyObject* tensors, Addresses& addresses) {
  return for_each_tensor(tensors, [&](Py_ssize_t, const at::Tensor& t) { addresses.push_back(t.const_data_ptr()); });
}

// A number, or None: most arguments are, and a look for a tensor takes some hundred times as long.
bool is_number(PyObject* item) {
  return PyLong_CheckExact(item) || PyFloat_CheckExact(item) || item == Py_None;
}

bool is_tensor(PyObject* item) {
  return THPVariable_CheckExact(item) || (!is_number(item) && !PyTuple_Check(item) && THPVariable_Check(item));
}

// The tuple with addresses for tensors, and the same of lists and tuples inside, if they are named or begin with one.
PyObject* pointers_in(PyObject* tuple) {
  const Py_ssize_t size = PyTuple_GET_SIZE(tuple);
  THPObjectPtr made(PyTuple_New(size));
  if (!made) throw python_error();
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* item = PyTuple_GET_ITEM(tuple, i);
    const bool inside = PyTuple_Check(item) && PyTuple_GET_SIZE(item) > 0 &&
                        (!PyTuple_CheckExact(item) || is_tensor(PyTuple_GET_ITEM(item, 0)));
    if (inside) {
      item = pointers_in(item);
    } else if (const auto* tensors = is_number(item) ? nullptr : listed(item)) {
      item = addresses_of(*tensors);
    } else if (is_tensor(item)) {
      item = address_of(THPVariable_Unpack(item));
    } else {
      Py_INCREF(item);
    }
    PyTuple_SET_ITEM(made.get(), i, item);
  }
  return made.release();
}

// The arguments of a kernel with addresses for tensors and plain tuples for named ones. Plain tuples that do not begin
// with a tensor stay as they are.
PyObject* pointers(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  if (!PyTuple_Check(arguments)) {
    PyErr_Format(PyExc_TypeError, "arguments are %s; expected a tuple", Py_TYPE(arguments)->tp_name);
    return nullptr;
  }
  return pointers_in(arguments);
  END_HANDLE_TH_ERRORS
}

template <typename Function>
PyCFunction fast(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef functions[] = {
    {"looks_of", noted<Looks, looks_at>, METH_O, "dtype, device, shape and strides of each tensor, as bytes."},
    {"look_as", fast(unchanged<Looks, looks_at>), METH_FASTCALL, "Whether tensors have the looks that looks_of gave."},
    {"kind_of", fast(kind_of), METH_FASTCALL, "What decides the path of x and base, apart from the tokens, as bytes."},
    {"seed_like", seed_like, METH_O, "A seed from the default generator, on the device of a tensor."},
    {"empties_like", fast(empties_like), METH_FASTCALL, "torch.empty_like of each tensor whose flag is True, as a list."},
    {"empties", fast(empties), METH_FASTCALL, "torch.empty of each dtype and shape, on the device of a tensor."},
    {"renewed", renewed, METH_O, "The same memory in a tensor with a node of its own, which is no view."},
    {"addresses_of", noted<Addresses, addresses_in>, METH_O, "data_ptr() of each tensor, as bytes."},
    {"lie_at", fast(unchanged<Addresses, addresses_in>), METH_FASTCALL,
     "Whether tensors have the addresses that addresses_of gave."},
    {"run_step", fast(run_step), METH_FASTCALL, "A step of a plan as one node of autograd."},
    {"pointers", pointers, METH_O, "A kernel's arguments with addresses for tensors and plain tuples for named ones."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
