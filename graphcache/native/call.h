// What a call is known by: plain tensors, their layouts, and a context in which nothing is special.
#pragma once

#include "tensors.h"

#define MOST_INPUTS 8
#define MOST_OUTPUTS 8
#define MOST_PLACES (MOST_INPUTS + MOST_OUTPUTS)
#define MOST_RANK 16
#define MOST_WORDS (1 + MOST_INPUTS * (1 + 2 * MOST_RANK))

typedef struct {
  size_t count;
  uint64_t at[MOST_WORDS];
} Words;

// The dispatch keys that a thread includes and excludes when nothing is special, in inference mode too: autocast, modes,
// transforms and tracing each change them. torch keeps them in a variable of each thread.
static uint64_t quiet_keys[2][2];

static const uint64_t *thread_keys(void) {
  static _Thread_local const uint64_t *found;
  if (found == NULL) found = dlsym(torch.library, "_ZN3c104impl26raw_local_dispatch_key_setE");
  return found;
}

static int is_inference(void) {
  const uint64_t *now = thread_keys();
  return now[0] == quiet_keys[1][0] && now[1] == quiet_keys[1][1];
}

// No gradients, no autocast, no modes, no transforms, no tracing.
static int nothing_special(void) {
  if (tensor_types == NULL) return 0;
  const uint64_t *now = thread_keys();
  return !torch.grad_mode() && ((now[0] == quiet_keys[0][0] && now[1] == quiet_keys[0][1]) || is_inference());
}

// Whether Python code gave an object attributes of its own, which a module may look at.
static int has_attributes(PyObject *object) {
  PyObject **dict = _PyObject_GetDictPtr(object);
  return dict != NULL && *dict != NULL && PyDict_GET_SIZE(*dict) != 0;
}

enum { NOT_PLAIN = -2, ON_THE_CPU = -1 };

static void *handle_of(PyObject *tensor) { return (char *)tensor + field.impl; }

// The device of an object that is a torch.Tensor itself, plain and dense, by its index; otherwise NOT_PLAIN. Dispatch
// keys say it all: any layout but strided, pending conjugation or negation, a subclass, a wrapper of a transform or a
// fake have a key more.
static int plain_device(PyObject *object) {
  if ((PyObject *)Py_TYPE(object) != PyTuple_GET_ITEM(tensor_types, 0) || has_attributes(object)) return NOT_PLAIN;
  const char *impl = READ(char *, (const char *)object, field.impl);
  const uint64_t found = READ(uint64_t, impl, field.keys) & ~keys.ignored;
  if ((found != keys.cpu && found != keys.cuda) || READ(char *, impl, field.storage) == NULL) return NOT_PLAIN;
  int32_t index = ON_THE_CPU;
  if (found == keys.cuda && torch.device_index(handle_of(object), &index) != 0) return NOT_PLAIN;
  return index;
}

// Adds the layout of a tensor to what a call is known by; false for what is not plain, or has too many dimensions.
static int describe_one(PyObject *object, Words *words) {
  const int device = plain_device(object);
  if (device == NOT_PLAIN) return 0;
  const char *impl = READ(char *, (const char *)object, field.impl);
  const int64_t rank = READ(int64_t, impl, field.rank);
  if (rank > MOST_RANK) return 0;
  const int64_t *sizes = sizes_of(impl, rank), *strides = strides_of(sizes, rank);
  uint64_t *at = words->at + words->count;
  *at++ = READ(uint16_t, impl, field.dtype) | (uint64_t)(device + 1) << 16 | (uint64_t)rank << 32;
  for (int64_t i = 0; i < rank; ++i) *at++ = (uint64_t)sizes[i], *at++ = (uint64_t)strides[i];
  words->count = (size_t)(at - words->at);
  return 1;
}

// What describe() in keys/call_key.py says of plain tensors, as numbers; false for what it says nothing of.
static int describe(PyObject *const *args, Py_ssize_t count, Words *words) {
  if (tensor_types == NULL || count < 1 || count > MOST_INPUTS) return 0;
  words->at[0] = (uint64_t)count << 1 | (uint64_t)is_inference();
  words->count = 1;
  for (Py_ssize_t i = 0; i < count; ++i) {
    for (Py_ssize_t j = 0; j < i; ++j)
      if (args[j] == args[i]) return 0;
    if (!describe_one(args[i], words)) return 0;
  }
  return 1;
}

static int same_words(const uint64_t *words, size_t count, const Words *wanted) {
  return count == wanted->count && memcmp(words, wanted->at, count * sizeof *words) == 0;
}

static uint64_t hash_of(const Words *words) {
  uint64_t hash = 0;
  for (size_t i = 0; i < words->count; ++i) {
    hash = (hash ^ words->at[i]) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash;
}

// Where a plain tensor's data lies; 0 for none. Memory that is shared until it is written is its own from then on.
static uint64_t address_of(PyObject *tensor) {
  void *found = NULL;
  return torch.data(handle_of(tensor), &found) == 0 ? (uint64_t)found : 0;
}

// Whether a tensor may be read or written where it lies, by a graph that needs its alignment; and where that is.
static inline int is_usable(PyObject *tensor, uint64_t mask, uint64_t *address) {
  *address = address_of(tensor);
  return *address != 0 && (*address & mask) == 0;
}
