// What a table knows beside its records: classes, callables, and the driver.
#pragma once

#include "record.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <unordered_map>

namespace {

struct State {
  Ref classes, modes, counter, raw_stream, current_device, quiet, epoch_name;
  Field executable, stream, hits, used, off;
  // What torch keeps of streams itself, null if raw_stream is to be asked, and the stream that it was asked for last.
  const c10::impl::DeviceGuardImplInterface* streams = nullptr;
  c10::StreamId known_id = 0;
  int known_device = -1;
  uint64_t known_stream = 0;
  std::shared_ptr<Driver> driver;
  std::unordered_multimap<uint64_t, Using> records;

  // Whether a CudaGraph was not closed; with the order's lock.
  bool is_open(PyObject* graph) const {
    PyObject* found = executable.in(graph);
    return found != nullptr && found != Py_None;
  }
};

struct Table {
  PyObject_HEAD
  State* state;
};

PyTypeObject* table_type;

}  // namespace
