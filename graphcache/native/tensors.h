// Tensors, read without torch's headers. Where the fields lie in a torch.Tensor, its TensorImpl and its StorageImpl is
// found out at load time from tensors whose fields Python tells (probe.py). For the rest there are functions of torch.
#pragma once

#include "base.h"

#include <dlfcn.h>

// TensorImpl keeps up to five sizes and strides in itself, more of them elsewhere.
#define MOST_INLINE 5

static struct {
  Py_ssize_t impl;     // in the object: TensorImpl *, which is all that an at::Tensor is
  Py_ssize_t storage;  // in TensorImpl: StorageImpl *
  Py_ssize_t offset;   // in TensorImpl: of the first element in the storage, int64
  Py_ssize_t keys;     // in TensorImpl: dispatch keys, uint64
  Py_ssize_t dtype;    // in TensorImpl: number of the dtype, uint16
  Py_ssize_t rank;     // in TensorImpl: number of dimensions, followed by the sizes and strides or a pointer to them
  Py_ssize_t data;     // in StorageImpl: the address of the memory
} field;

// Sets of dispatch keys.
static struct {
  uint64_t needed, permitted;   // what those of a dense tensor include, and may include
  uint64_t ignored, cpu, cuda;  // of a plain one: what may be there or not, and which others are
} keys;

static struct {
  void *library;
  int32_t (*device_index)(void *tensor, int32_t *index);
  int32_t (*data)(void *tensor, void **address);
  _Bool (*grad_mode)(void);
} torch;

static PyObject *tensor_types;  // (Tensor, Parameter); NULL until all of this is known

#define READ(type, base, at) (*(const type *)((base) + (at)))

static inline const int64_t *sizes_of(const char *impl, int64_t rank) {
  const char *after = impl + field.rank + sizeof(int64_t);
  return rank <= MOST_INLINE ? (const int64_t *)after : *(const int64_t *const *)after;
}

static inline const int64_t *strides_of(const int64_t *sizes, int64_t rank) {
  return sizes + (rank <= MOST_INLINE ? MOST_INLINE : rank);
}

// ---- the tensors of a guard

typedef struct {
  PyObject *tensor;
  PyTypeObject *type;  // in tensor_types, which holds it
  const char *impl, *data;
  int64_t offset;
  uint64_t keys;
  uint16_t dtype;
  int64_t rank;
  Py_ssize_t layout;  // where its sizes and strides begin in `numbers`
} Tensor;

typedef struct {
  Tensor *items;
  Py_ssize_t count, capacity;
  struct {
    int64_t *items;
    Py_ssize_t count, capacity;
  } numbers;
} Tensors;

// Reads all but the layout. The memory of a tensor without storage is NULL.
static inline Tensor read_tensor(PyObject *object) {
  const char *impl = READ(char *, (const char *)object, field.impl);
  const char *storage = READ(char *, impl, field.storage);
  return (Tensor){
      .tensor = object,
      .type = Py_TYPE(object),
      .impl = impl,
      .data = storage == NULL ? NULL : READ(char *, storage, field.data),
      .offset = READ(int64_t, impl, field.offset),
      .keys = READ(uint64_t, impl, field.keys),
      .dtype = READ(uint16_t, impl, field.dtype),
      .rank = READ(int64_t, impl, field.rank),
  };
}

static inline int same_tensor(const Tensor *was, const int64_t *numbers) {
  const char *impl = was->impl;
  // torch.utils.swap_tensors() replaces the TensorImpl.
  if (READ(char *, (const char *)was->tensor, field.impl) != impl || Py_TYPE(was->tensor) != was->type) return 0;
  const char *storage = READ(char *, impl, field.storage);
  if ((storage == NULL ? NULL : READ(char *, storage, field.data)) != was->data ||
      READ(int64_t, impl, field.offset) != was->offset || READ(uint64_t, impl, field.keys) != was->keys ||
      READ(uint16_t, impl, field.dtype) != was->dtype || READ(int64_t, impl, field.rank) != was->rank)
    return 0;
  const int64_t rank = was->rank, *sizes = sizes_of(impl, rank), *strides = strides_of(sizes, rank);
  for (int64_t i = 0; i < rank; ++i)
    if (sizes[i] != numbers[i] || strides[i] != numbers[rank + i]) return 0;
  return 1;
}

static int same_tensors(const Tensors *all) {
  for (Py_ssize_t i = 0; i < all->count; ++i)
    if (!same_tensor(all->items + i, all->numbers.items + all->items[i].layout)) return 0;
  return 1;
}

// Whether an object is a tensor that can be read; sets TypeError if not.
static int check_tensor(PyObject *object) {
  int known = 0;
  for (Py_ssize_t i = 0; tensor_types != NULL && i < PyTuple_GET_SIZE(tensor_types); ++i)
    known |= (PyObject *)Py_TYPE(object) == PyTuple_GET_ITEM(tensor_types, i);
  if (!known) {
    PyErr_Format(PyExc_TypeError, "%.100s is not torch.Tensor or torch.nn.Parameter itself", Py_TYPE(object)->tp_name);
    return -1;
  }
  // The keys are those of every TensorImpl; only a dense one is sure to have the rest.
  const char *impl = READ(char *, (const char *)object, field.impl);
  const uint64_t found = READ(uint64_t, impl, field.keys);
  if ((found & keys.needed) == keys.needed && !(found & ~keys.permitted) && READ(char *, impl, field.storage)) return 0;
  PyErr_SetString(PyExc_TypeError, "the tensor is not a dense one in the memory of a CPU or GPU");
  return -1;
}

static int add_tensor(Tensors *all, PyObject *object) {
  if (check_tensor(object)) return -1;
  Tensor read = read_tensor(object);
  if (RESERVE(all, 1) || RESERVE(&all->numbers, 2 * read.rank)) return -1;
  const int64_t *sizes = sizes_of(read.impl, read.rank), *strides = strides_of(sizes, read.rank);
  int64_t *numbers = all->numbers.items + all->numbers.count;
  for (int64_t i = 0; i < read.rank; ++i) numbers[i] = sizes[i], numbers[read.rank + i] = strides[i];
  read.layout = all->numbers.count;
  all->numbers.count += 2 * read.rank;
  all->items[all->count++] = read;
  return 0;
}
