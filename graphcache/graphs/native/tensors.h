// What a call is known by: plain tensors, their layouts, and a context in which nothing is special.
#pragma once

#include "objects.h"

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <vector>

// ATen/functorch/DynamicLayer.h wants a header that torch does not ship. Whether the stack is empty needs no more.
namespace at::functorch {
struct DynamicLayer;
TORCH_API const std::vector<DynamicLayer>& getDynamicLayerStack();
}  // namespace at::functorch

namespace {

using Words = c10::SmallVector<uint64_t, 64>;

constexpr Py_ssize_t most_inputs = 8, most_outputs = 8, most_places = most_inputs + most_outputs;

// No gradients, no autocast, no modes, no transforms, no tracing.
bool nothing_special() {
  return !c10::GradMode::is_enabled() &&
      c10::impl::tls_local_dispatch_key_set().excluded_.has_all(c10::autocast_dispatch_keyset) &&
      c10::impl::TorchDispatchModeTLS::stack_len() == 0 && at::functorch::getDynamicLayerStack().empty() &&
      !torch::jit::tracer::isTracing();
}

// Whether Python code gave an object attributes of its own, which a module may look at.
bool has_attributes(PyObject* object) {
  PyObject** dict = _PyObject_GetDictPtr(object);
  return dict != nullptr && *dict != nullptr && PyDict_GET_SIZE(*dict) != 0;
}

// The tensor in an object that is a torch.Tensor itself, plain and dense, on a GPU or on the CPU; otherwise null. Its
// dispatch keys say it all: any layout but strided, pending conjugation or negation, a subclass, a wrapper of a
// transform or a fake have a key more.
c10::TensorImpl* plain(PyObject* object) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != THPVariableClass || has_attributes(object)) return nullptr;
  c10::TensorImpl* tensor = THPVariable_Unpack(object).unsafeGetTensorImpl();
  const auto keys =
      tensor->key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  constexpr c10::DispatchKeySet cuda(c10::DispatchKey::CUDA), cpu(c10::DispatchKey::CPU);
  return (keys == cuda || keys == cpu) && tensor->has_storage() ? tensor : nullptr;
}

void describe_one(const c10::TensorImpl& tensor, Words& words) {
  const auto device = tensor.device();
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  words.push_back(static_cast<uint64_t>(tensor.dtype().toScalarType()) | static_cast<uint64_t>(device.type()) << 8 |
                  static_cast<uint64_t>(static_cast<uint8_t>(device.index())) << 16 | uint64_t{sizes.size()} << 32);
  for (size_t i = 0; i < sizes.size(); ++i) {
    words.push_back(static_cast<uint64_t>(sizes[i]));
    words.push_back(static_cast<uint64_t>(strides[i]));
  }
}

// What describe() in keys/call_key.py says of plain tensors, as numbers; false for what it says nothing of.
bool describe(PyObject* const* args, Py_ssize_t count, c10::TensorImpl** tensors, Words& words) {
  if (count < 1 || count > most_inputs) return false;
  words.push_back(static_cast<uint64_t>(count) << 1 | static_cast<uint64_t>(c10::InferenceMode::is_enabled()));
  for (Py_ssize_t i = 0; i < count; ++i) {
    for (Py_ssize_t j = 0; j < i; ++j)
      if (args[j] == args[i]) return false;
    if ((tensors[i] = plain(args[i])) == nullptr) return false;
    describe_one(*tensors[i], words);
  }
  return true;
}

bool describe(PyObject* tuple, c10::TensorImpl** tensors, Words& words) {
  return describe(PySequence_Fast_ITEMS(tuple), PyTuple_GET_SIZE(tuple), tensors, words);
}

uint64_t hash_of(const Words& words) {
  uint64_t hash = 0;
  for (const uint64_t word : words) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash;
}

uint64_t address_of(c10::TensorImpl* tensor) { return reinterpret_cast<uint64_t>(tensor->mutable_data()); }

}  // namespace
