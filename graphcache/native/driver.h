// The functions of the CUDA driver that are called here, at addresses that Python asked the driver for, and what else a
// launch asks.
#pragma once

#include "call.h"

typedef enum { DONE, LEFT_ALONE, FAILED } Outcome;

// CUDA_GRAPH_INSTANTIATE_PARAMS.
typedef struct {
  uint64_t flags;
  void *upload_stream, *failed_node;
  int result;
} InstantiateParams;

// c10::cuda::CUDAStream: to torch a stream is a number, which stands for one handle for good.
typedef struct {
  int8_t device_type, device_index;
  int64_t id;
} TorchStream;

// Of the process, and said again for every table.
static struct {
  // As the C interface of CUDA 12 declares them; a CUresult is an int.
  int (*launch)(void *executable, void *stream);
  int (*set_kernel)(void *executable, void *node, const void *params);
  int (*set_copy)(void *executable, void *node, const void *params, void *context);
  int (*is_capturing)(void *stream, int *status);
  int (*current_context)(void **context);
  int (*instantiate)(void **executable, void *graph, InstantiateParams *params);
  int (*destroy)(void *executable);
  TorchStream (*torch_stream)(int8_t device);  // c10::cuda::getCurrentCUDAStream, NULL if raw_stream is to be asked
  TorchStream known;                           // the stream that raw_stream was asked for last
  uint64_t known_handle;
  PyObject *held;  // the arguments, from which everything below is borrowed
  PyObject *modes, *counter, *raw_stream, *requires_grad, *failure, *quiet;
  PyObject *current_device;  // None where there is one device
  Field executable, stream, hits, used, off, version, proven, compared;
} driver;

// connect((CudaGraph, StreamOrder, Entry, Modes, ModuleGuard, StateSnapshot), modes, counter, raw_stream, current_device, requires_grad, failure,
// quiet, seven addresses, torch_stream)
static PyObject *connect_driver(PyObject *module UNUSED, PyObject *given) {
  PyObject *graph, *order, *entry, *modes_class, *guard, *snapshot;
  unsigned long long at[7], torch_stream;
  typeof(driver) new = {.known.device_index = -1, .held = given};
  if (!PyArg_ParseTuple(given, "(OOOOOO)OOOOOOO(KKKKKKK)K:connect", &graph, &order, &entry, &modes_class, &guard,
                        &snapshot, &new.modes, &new.counter, &new.raw_stream, &new.current_device, &new.requires_grad, &new.failure, &new.quiet,
                        at, at + 1, at + 2, at + 3, at + 4, at + 5, at + 6, &torch_stream) ||
      find_field(&new.executable, graph, "executable") || find_field(&new.stream, order, "stream") ||
      find_field(&new.hits, entry, "hits") || find_field(&new.used, entry, "used") ||
      find_field(&new.off, modes_class, "off") || find_field(&new.version, guard, "version") ||
      find_field(&new.proven, guard, "known") || find_field(&new.compared, snapshot, "compared"))
    return NULL;
  int complete = PyContextVar_CheckExact(new.modes) && PyIter_Check(new.counter) &&
                 Py_IS_TYPE(new.requires_grad, &PyGetSetDescr_Type) && tensor_types != NULL;
  for (int i = 0; i < 7; ++i) complete &= at[i] != 0;
  if (!complete) return PyErr_Format(PyExc_TypeError, "expected a context variable, an iterator and seven addresses");
  new.launch = (void *)at[0], new.set_kernel = (void *)at[1], new.set_copy = (void *)at[2];
  new.is_capturing = (void *)at[3], new.current_context = (void *)at[4], new.instantiate = (void *)at[5];
  new.destroy = (void *)at[6], new.torch_stream = (void *)torch_stream;
  OWNED PyObject *before = driver.held;
  Py_INCREF(given);
  driver = new;
  Py_RETURN_NONE;
}

// What a function of the driver refused.
static Outcome refused(const char *name, int code) {
  OWNED PyObject *error = PyObject_CallFunction(driver.failure, "si", name, code);
  if (error != NULL) PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  return FAILED;
}

static Outcome launch(void *executable, uint64_t stream) {
  int code;
  Py_BEGIN_ALLOW_THREADS
  code = driver.launch(executable, (void *)stream);
  Py_END_ALLOW_THREADS
  return code == 0 ? DONE : refused("cuGraphLaunch", code);
}

// ---- where a call is launched, asked without touching anything

// What a launch needs besides the graph's own: the device by its index, and its context.
typedef struct {
  PyObject *index;
  int device;  // -1 for what is none
  uint64_t context;
} Device;

static Device device_of(PyObject *index, unsigned long long context) {
  const long found = PyLong_CheckExact(index) ? PyLong_AsLong(index) : -1;
  if (found == -1) PyErr_Clear();
  return (Device){index, found >= 0 && found < 128 ? (int)found : -1, context};
}

// The current stream, as a raw handle.
static Outcome current_stream(const Device *device, uint64_t *stream) {
  TorchStream now = {0, -1, 0};
  if (driver.torch_stream != NULL && device->device >= 0) {
    now = driver.torch_stream((int8_t)device->device);
    if (now.id == driver.known.id && now.device_index == driver.known.device_index) {
      *stream = driver.known_handle;
      return DONE;
    }
  }
  OWNED PyObject *number = PyObject_CallOneArg(driver.raw_stream, device->index);
  if (number == NULL) return FAILED;
  *stream = PyLong_AsUnsignedLongLong(number);
  if (PyErr_Occurred()) return FAILED;
  driver.known = now, driver.known_handle = *stream;
  return DONE;
}

// Whether a stream is the one that was captured for: the legacy default stream is that of the current context.
static int is_here(const Device *device, uint64_t stream) {
  void *current = NULL;
  return stream != 0 || (driver.current_context(&current) == 0 && (uint64_t)current == device->context);
}

// Whether a call may be launched: what the caller's context forbids.
static Outcome may_launch(const Device *device, uint64_t *stream) {
  PyObject *found = NULL;
  if (PyContextVar_Get(driver.modes, NULL, &found) < 0) return FAILED;
  OWNED PyObject *modes = found;
  if (modes == NULL || !is_of(driver.off, modes) || *field_of(driver.off, modes) != Py_False) return LEFT_ALONE;
  const Outcome known = current_stream(device, stream);
  if (known != DONE) return known;
  if (!is_here(device, *stream)) return LEFT_ALONE;
  if (driver.current_device != Py_None) {
    OWNED PyObject *current = PyObject_CallNoArgs(driver.current_device);
    const int same = current == NULL ? -1 : PyObject_RichCompareBool(current, device->index, Py_EQ);
    if (same <= 0) return same < 0 ? FAILED : LEFT_ALONE;
  }
  int status = 0;
  return driver.is_capturing((void *)*stream, &status) == 0 && status == 0 ? DONE : LEFT_ALONE;
}

// With the order's lock: whether a CudaGraph was not closed, and its order ran last on this stream.
static int is_current(PyObject *graph, PyObject *order, uint64_t stream) {
  PyObject *executable = *field_of(driver.executable, graph);
  return executable != NULL && executable != Py_None && number_in(driver.stream, order) == stream;
}
