// Where torch keeps the fields of a tensor: the one place at which every sample has what Python says of it.
#pragma once

#include "tensors.h"

#define MOST_SAMPLES 64

// A sample as Python tells it, in this order after the tensor.
enum { TOLD_IMPL, TOLD_STORAGE, TOLD_DATA, TOLD_OFFSET, TOLD_KEYS, TOLD_DTYPE, TOLD_RANK, TOLD };

typedef struct {
  PyObject *tensor, *sizes, *strides;
  unsigned long long told[TOLD];
} Sample;

// How many bytes of what a sample points to may be read.
static size_t readable(const Sample *sample, const char *base) {
  if (base == (const char *)sample->tensor) return (size_t)Py_TYPE(sample->tensor)->tp_basicsize;
  return malloc_usable_size((void *)base);
}

// What a field is looked for in: the object itself (-1), or what a told address points to.
static const char *base_of(const Sample *sample, int within) {
  return within < 0 ? (const char *)sample->tensor : (const char *)(uintptr_t)sample->told[within];
}

// The only offset at which all samples have `what`, in `width` bytes. Returns -1 with an error set if there is not one.
static Py_ssize_t locate(const Sample *samples, Py_ssize_t count, int within, int what, size_t width, const char *name) {
  size_t end = SIZE_MAX;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const size_t length = readable(samples + i, base_of(samples + i, within));
    if (length < end) end = length;
  }
  Py_ssize_t found = -1, candidates = 0;
  // Past the reference count; a TensorImpl and a StorageImpl begin with a pointer to their methods.
  for (size_t at = sizeof(void *); at + width <= end; at += width) {
    Py_ssize_t agreeing = 0;
    // The machine is little-endian, as every one with a GPU is.
    while (agreeing < count &&
           memcmp(base_of(samples + agreeing, within) + at, &samples[agreeing].told[what], width) == 0)
      ++agreeing;
    if (agreeing < count) continue;
    found = (Py_ssize_t)at;
    ++candidates;
  }
  if (candidates == 1) return found;
  PyErr_Format(PyExc_RuntimeError, "the place of the %s of a tensor is unknown: %zd candidates", name, candidates);
  return -1;
}

static int is_told(const int64_t *found, PyObject *told) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(told); ++i) {
    const long long number = PyLong_AsLongLong(PyTuple_GET_ITEM(told, i));
    if ((number == -1 && PyErr_Occurred()) || found[i] != number) return 0;
  }
  return 1;
}

static int check_layouts(const Sample *samples, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    const int64_t rank = (int64_t)samples[i].told[TOLD_RANK];
    const int64_t *sizes = sizes_of(base_of(samples + i, TOLD_IMPL), rank);
    if (rank == PyTuple_GET_SIZE(samples[i].sizes) && rank == PyTuple_GET_SIZE(samples[i].strides) &&
        is_told(sizes, samples[i].sizes) && is_told(strides_of(sizes, rank), samples[i].strides))
      continue;
    PyErr_SetString(PyExc_RuntimeError, "the place of the sizes and strides of a tensor is unknown");
    return -1;
  }
  return 0;
}

static int locate_fields(const Sample *samples, Py_ssize_t count) {
#define LOCATE(what, within, told, width) \
  if ((field.what = locate(samples, count, (within), (told), (width), #what)) < 0) return -1
  LOCATE(impl, -1, TOLD_IMPL, sizeof(void *));
  LOCATE(storage, TOLD_IMPL, TOLD_STORAGE, sizeof(void *));
  LOCATE(offset, TOLD_IMPL, TOLD_OFFSET, sizeof(int64_t));
  LOCATE(keys, TOLD_IMPL, TOLD_KEYS, sizeof(uint64_t));
  LOCATE(dtype, TOLD_IMPL, TOLD_DTYPE, sizeof(uint16_t));
  LOCATE(rank, TOLD_IMPL, TOLD_RANK, sizeof(int64_t));
  LOCATE(data, TOLD_STORAGE, TOLD_DATA, sizeof(void *));
#undef LOCATE
  return check_layouts(samples, count);
}

// probe(samples, types, needed_keys, permitted_keys)
static PyObject *probe(PyObject *module, PyObject *args) {
  (void)module;
  PyObject *told, *types;
  unsigned long long needed, permitted;
  Sample samples[MOST_SAMPLES];
  if (!PyArg_ParseTuple(args, "O!O!KK", &PyTuple_Type, &told, &PyTuple_Type, &types, &needed, &permitted)) return NULL;
  const Py_ssize_t count = PyTuple_GET_SIZE(told);
  if (count < 1 || count > MOST_SAMPLES) return PyErr_Format(PyExc_ValueError, "%zd samples", count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    Sample *to = samples + i;
    unsigned long long *numbers = to->told;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(told, i), "OKKKKKKKO!O!", &to->tensor, numbers, numbers + 1, numbers + 2,
                          numbers + 3, numbers + 4, numbers + 5, numbers + 6, &PyTuple_Type, &to->sizes, &PyTuple_Type,
                          &to->strides))
      return NULL;
  }
  Py_CLEAR(tensor_types);
  if (locate_fields(samples, count)) return NULL;
  needed_keys = needed;
  permitted_keys = permitted;
  tensor_types = Py_NewRef(types);
  Py_RETURN_NONE;
}

static PyObject *tuple_of(const int64_t *numbers, int64_t count) {
  PyObject *made = PyTuple_New((Py_ssize_t)count);
  for (int64_t i = 0; made != NULL && i < count; ++i) {
    PyObject *number = PyLong_FromLongLong(numbers[i]);
    if (number == NULL) Py_CLEAR(made);
    else PyTuple_SET_ITEM(made, (Py_ssize_t)i, number);
  }
  return made;
}

// read(tensor) -> (address of the memory, offset, keys, dtype, sizes, strides), for comparison with Python
static PyObject *read_fields(PyObject *module, PyObject *object) {
  (void)module;
  if (check_tensor(object)) return NULL;
  const Tensor read = read_tensor(object);
  const int64_t *sizes = sizes_of(read.impl, read.rank);
  return Py_BuildValue("KLKHNN", (unsigned long long)(uintptr_t)read.data, (long long)read.offset,
                       (unsigned long long)read.keys, read.dtype, tuple_of(sizes, read.rank),
                       tuple_of(strides_of(sizes, read.rank), read.rank));
}
