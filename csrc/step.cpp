#include "step.h"

#include "tensor_list.h"

#include <c10/core/SafePyObject.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

namespace fvae_kernels {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Keeps a Python object alive for a node, which may die on a thread without the interpreter's lock.
struct Kept : torch::CustomClassHolder {
  explicit Kept(PyObject* object) : object(Py_NewRef(object), getPyInterpreter()) {}
  c10::SafePyObject object;
};

struct Arguments {
  PyObject* const* objects;  // step, base, *entries
  variable_list tensors;     // base, *entries; undefined for None
};

// A new tuple: the tensors, None where one is not defined.
PyObject* tuple_of(at::TensorList tensors) {
  THPObjectPtr made(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  if (!made) throw python_error();
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* one = THPVariable_Wrap(tensors[i]);
    if (!one) throw python_error();
    PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), one);
  }
  return made.release();
}

// The tensor, or an undefined one for None.
at::Tensor tensor_of(PyObject* object) {
  if (object == Py_None) return {};
  if (THPVariable_Check(object)) return THPVariable_Unpack(object);
  PyErr_Format(PyExc_TypeError, "%s; expected a tensor or None", Py_TYPE(object)->tp_name);
  throw python_error();
}

THPObjectPtr sequence_of(PyObject* object) {
  THPObjectPtr entries(PySequence_Fast(object, "a step must return a sequence"));
  if (!entries) throw python_error();
  return entries;
}

template <typename Body>
void for_each_of(PyObject* object, const Body& body) {
  THPObjectPtr entries = sequence_of(object);
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(entries.get()); ++i) {
    body(PySequence_Fast_GET_ITEM(entries.get(), i));
  }
}

// The entries of what a method of the step returned, of which there must be `size`.
THPObjectPtr entries_of(PyObject* returned, Py_ssize_t size) {
  const THPObjectPtr owned(returned);
  if (!returned) throw python_error();
  THPObjectPtr entries = sequence_of(returned);
  TORCH_CHECK(PySequence_Fast_GET_SIZE(entries.get()) == size, "a step returned ",
              PySequence_Fast_GET_SIZE(entries.get()), " entries; expected ", size);
  return entries;
}

// What `Step.backward` returned: `Gradients` of ops/_layer_plan.py.
struct Gradients {
  at::Tensor base, x;
  variable_list converted;
  const variable_list* made;  // lives as long as `entries`
  std::vector<size_t> places;

  explicit Gradients(PyObject* entries) {
    const auto entry = [&](Py_ssize_t i) { return PySequence_Fast_GET_ITEM(entries, i); };
    base = tensor_of(entry(0)), x = tensor_of(entry(1));
    made = listed(entry(2));
    if (!made) {
      for_each_of(entry(2), [&](PyObject* one) { converted.push_back(tensor_of(one)); });
      made = &converted;
    }
    for_each_of(entry(3), [&](PyObject* one) {
      places.push_back(PyLong_AsSize_t(one));
      if (PyErr_Occurred()) throw python_error();
      TORCH_CHECK(places.back() <= made->size(), "a step returned ", made->size(), " gradients and place ", places.back());
    });
  }
  at::Tensor of(size_t parameter) const {
    const size_t place = places[parameter];
    return place == 0 ? at::Tensor() : (*made)[place - 1];
  }
};

PyObject* name(const char* text) {
  PyObject* made = PyUnicode_InternFromString(text);
  if (!made) throw python_error();
  return made;
}

// PyTorch's own Function for C++ around the two methods of a step.
struct PlannedLayer : torch::autograd::Function<PlannedLayer> {
  // `inputs` are the tensors that are defined: those that PyTorch ties to the node.
  static variable_list forward(AutogradContext* ctx, const Arguments& arguments, at::TensorList /*inputs*/) {
    static PyObject* const method = name("forward");
    variable_list saved = arguments.tensors;
    THPObjectPtr returned =
        entries_of(PyObject_VectorcallMethod(method, arguments.objects, saved.size() + 1, nullptr), 3);
    at::Tensor results[3];
    for (int i = 0; i < 3; ++i) results[i] = tensor_of(PySequence_Fast_GET_ITEM(returned.get(), i));
    auto& [y, terms, state] = results;
    saved[0] = state;
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["step"] = at::IValue::make_capsule(c10::make_intrusive<Kept>(arguments.objects[0]));
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({terms});
    return {y, part_of(terms, terms.dtype(), {}, {}, terms.storage_offset()), terms};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const pybind11::gil_scoped_acquire lock;
    static PyObject* const method = name("backward");
    const auto kept = ctx->saved_data["step"].toCapsule();
    PyObject* step = static_cast<Kept*>(kept.get())->object.ptr(getPyInterpreter());
    // which gradients are asked for: of base, and of each entry, which `saved` has behind the state
    THPObjectPtr needed(PyTuple_New(static_cast<Py_ssize_t>(saved.size())));
    if (!needed) throw python_error();
    size_t edges = 0;
    for (size_t i = 0; i < saved.size(); ++i) {
      const bool there = i == 0 || saved[i].defined();
      PyObject* flag = there && ctx->needs_input_grad(edges) ? Py_True : Py_False;
      edges += there;
      PyTuple_SET_ITEM(needed.get(), static_cast<Py_ssize_t>(i), Py_NewRef(flag));
    }
    THPObjectPtr held(tuple_of(saved)), grad_y(THPVariable_Wrap(grads[0])), grad_loss(THPVariable_Wrap(grads[1]));
    PyObject* const arguments[] = {step, needed.get(), held.get(), grad_y.get(), grad_loss.get()};
    THPObjectPtr returned = entries_of(PyObject_VectorcallMethod(method, arguments, 5, nullptr), 4);
    const Gradients gradients(returned.get());
    TORCH_CHECK(gradients.places.size() + 2 <= saved.size(), "a step returned places for ", gradients.places.size(),
                " parameters; there are ", saved.size() - 2, " entries");
    const size_t first = saved.size() - gradients.places.size();  // of the parameters
    variable_list made{at::Tensor()};  // of the arguments as Python has them
    made.reserve(edges + 1);
    for (size_t i = 0; i < saved.size(); ++i) {
      if (i > 0 && !saved[i].defined()) continue;
      made.push_back(i == 0 ? gradients.base : i == 1 ? gradients.x : i < first ? at::Tensor() : gradients.of(i - first));
    }
    return made;
  }
};

}  // namespace fvae_kernels

// A compiled backward traces Python, which this node hides. `run_step` of ops/_host.py does not use it then.
template <>
void torch::autograd::CppNode<fvae_kernels::PlannedLayer>::compiled_args(CompiledNodeArgs&) const {
  TORCH_CHECK(false,
              "compiled autograd is on in the backward of an FVAE layer, and was off in its forward: switch it on "
              "around both, or in neither");
}

PyObject* run_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  using namespace fvae_kernels;
  TORCH_CHECK_TYPE(count >= 2 && THPVariable_Check(arguments[1]), "expected a step, base, and what the step saves");
  Arguments all{arguments, {}};
  variable_list there;
  all.tensors.reserve(static_cast<size_t>(count) - 1), there.reserve(static_cast<size_t>(count) - 1);
  for (Py_ssize_t i = 1; i < count; ++i) {
    all.tensors.push_back(tensor_of(arguments[i]));
    if (all.tensors.back().defined()) there.push_back(all.tensors.back());
  }
  return tuple_of(PlannedLayer::apply(all, at::TensorList(there)));
  END_HANDLE_TH_ERRORS
}
