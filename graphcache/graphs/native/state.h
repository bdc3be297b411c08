// What a table knows beside its records: classes, callables, and the driver.
#pragma once

#include "record.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <unordered_map>

namespace {

// The driver's functions, by what the C interface of CUDA 12 says of them; a CUresult is an int.
using Launch = int (*)(void* executable, void* stream);
using SetKernel = int (*)(void* executable, void* node, const void* params);
using SetCopy = int (*)(void* executable, void* node, const void* params, void* context);
using IsCapturing = int (*)(void* stream, int* status);
using CurrentContext = int (*)(void** context);

struct State {
  Ref classes, modes, counter, raw_stream, current_device, fail, quiet, epoch_name;
  Field executables, ready, ready_stream, ready_inference, stream, last, hits, used, off;
  // What torch keeps of streams itself, null if raw_stream is to be asked, and the stream that it was asked for last.
  const c10::impl::DeviceGuardImplInterface* streams = nullptr;
  c10::StreamId known_id = 0;
  int known_device = -1;
  uint64_t known_stream = 0;
  Launch launch;
  SetKernel set_kernel;
  SetCopy set_copy;
  IsCapturing is_capturing;
  CurrentContext current_context;
  std::unordered_multimap<uint64_t, Using> records;
};

struct Table {
  PyObject_HEAD
  State* state;
};

PyTypeObject* table_type;

enum class Outcome { done, left_alone, failed };

Outcome raise_failure(State& state, const char* name, int code) {
  Ref error(PyObject_CallFunction(state.fail.get(), "si", name, code));
  if (error) PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.get())), error.get());
  return Outcome::failed;
}

}  // namespace
