// A sequence of tensors without Python objects: one is made when an entry is read. And tensors that share memory.
#pragma once
#include <torch/csrc/python_headers.h>

#include <ATen/core/Tensor.h>

#include <vector>

// A tensor on the memory of another, which to autograd is no view of it. `offset` is in entries.
inline at::Tensor part_of(
    const at::Tensor& memory, caffe2::TypeMeta dtype, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  at::Tensor part = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(memory.storage()), memory.key_set(), dtype);
  part.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return part;
}

// A new list, or null with a Python error.
PyObject* tensor_list(std::vector<at::Tensor> tensors);

// The tensors of a list; null if the object is none.
const std::vector<at::Tensor>* listed(PyObject* object);
