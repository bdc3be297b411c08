// Whether a call may go on, asked without touching anything.
#pragma once

#include "state.h"

namespace {

// The current stream of a device, as a raw handle. To torch a stream is a number, which stands for one handle for good.
Outcome current_stream(State& state, PyObject* index, int device, uint64_t* stream) {
  c10::StreamId id = 0;
  if (state.streams != nullptr && device >= 0) {
    id = state.streams->getStream(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device))).id();
    if (id == state.known_id && device == state.known_device) {
      *stream = state.known_stream;
      return Outcome::done;
    }
  }
  Ref number(PyObject_CallOneArg(state.raw_stream.get(), index));
  if (!number) return Outcome::failed;
  *stream = PyLong_AsUnsignedLongLong(number.get());
  if (PyErr_Occurred()) return Outcome::failed;
  if (state.streams != nullptr && device >= 0)
    state.known_id = id, state.known_device = device, state.known_stream = *stream;
  return Outcome::done;
}

// Whether a stream is the one that was captured for: the legacy default stream is that of the current context.
bool is_here(const State& state, uint64_t stream, uint64_t context) {
  void* current = nullptr;
  return stream != 0 || (state.driver->current_context(&current) == 0 && reinterpret_cast<uint64_t>(current) == context);
}

// Whether the call may go on: what the caller's context forbids, asked without touching anything.
Outcome may_launch(State& state, const Record& record, uint64_t* stream) {
  PyObject* found = nullptr;
  if (PyContextVar_Get(state.modes.get(), nullptr, &found) < 0) return Outcome::failed;
  Ref modes(found);
  if (!modes || !state.off.is_of(modes.get()) || state.off.in(modes.get()) != Py_False) return Outcome::left_alone;
  if (const auto known = current_stream(state, record.index, record.device, stream); known != Outcome::done)
    return known;
  if (!is_here(state, *stream, record.context)) return Outcome::left_alone;
  if (state.current_device) {
    Ref device(PyObject_CallNoArgs(state.current_device.get()));
    if (!device) return Outcome::failed;
    const int same = PyObject_RichCompareBool(device.get(), record.index, Py_EQ);
    if (same <= 0) return same < 0 ? Outcome::failed : Outcome::left_alone;
  }
  int status = 0;
  const bool idle = state.driver->is_capturing(reinterpret_cast<void*>(*stream), &status) == 0 && status == 0;
  return idle ? Outcome::done : Outcome::left_alone;
}

// With the order's lock: whether the graph is there, of this epoch, and ran last on this stream.
Outcome is_current(State& state, const Record& record, uint64_t stream) {
  if (!state.is_open(record.graph)) return Outcome::left_alone;
  if (state.stream.number(record.order) != stream) return Outcome::left_alone;
  if (record.engine == nullptr) return Outcome::done;
  // Where nn.Module would find it in the end.
  Ref attributes(PyObject_GenericGetDict(record.engine, nullptr));
  if (!attributes) return Outcome::failed;
  PyObject* epoch = PyDict_GetItemWithError(attributes.get(), state.epoch_name.get());
  if (epoch == nullptr) return PyErr_Occurred() ? Outcome::failed : Outcome::left_alone;
  if (epoch == record.epoch) return Outcome::done;
  const int same = PyObject_RichCompareBool(epoch, record.epoch, Py_EQ);
  return same < 0 ? Outcome::failed : same == 0 ? Outcome::left_alone : Outcome::done;
}

bool are_usable(const Graph& graph, c10::TensorImpl* const* tensors, uint64_t* addresses) {
  for (size_t i = 0; i < graph.inputs; ++i) {
    addresses[i] = address_of(tensors[i]);
    if (addresses[i] == 0 || (addresses[i] & graph.places[i].mask) != 0) return false;
  }
  return true;
}

}  // namespace
