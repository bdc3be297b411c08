// A hit: find the graph of a call, choose and point an executable, launch, and prepare the next call.
#pragma once

#include "executables.h"
#include "guard.h"

// What is known of calls of one layout: which graph answers them, and when it may.
typedef struct Record {
  struct Record *next;  // of the same bucket
  uint64_t hash;
  int users;       // the table, and calls; guarded by the GIL, as everything here
  PyObject *held;  // everything borrowed below
  Lock *lock;
  Graph *native;
  PyObject *entry, *graph, *order;
  PyObject *engine, *epoch, *build;       // NULL where there is none
  PyObject *guard, *ambient, *is_stale;   // of a module that is no engine, whose epoch is the guard's version; or NULL
  uint64_t version;                       // the epoch, of a guard
  PyObject *updates;                      // where state of a module begins and ends that the graph writes; bytes
  Device device;
  size_t count;
  uint64_t words[];
} Record;

#define BUCKETS 256

// The graphs of one module.
typedef struct {
  PyObject_HEAD
  Record *buckets[BUCKETS];
  size_t count;
} Table;

static void unuse(Record *record) {
  if (record == NULL || --record->users != 0) return;
  Py_XDECREF(record->held);
  PyMem_Free(record);
}

static void unuse_at(Record **record) { unuse(*record); }
#define USING __attribute__((cleanup(unuse_at)))

// In use, or NULL: whoever clears the table meanwhile takes nothing from under the call.
static Record *find(Table *table, const Words *words) {
  const uint64_t hash = hash_of(words);
  Record *record = table->buckets[hash % BUCKETS];
  while (record != NULL && (record->hash != hash || !same_words(record->words, record->count, words)))
    record = record->next;
  if (record == NULL) return NULL;
  // With many graphs in turn nothing of one is left in the caches: what is read next comes at once, not one by one.
  __builtin_prefetch(&record->native->executables);
  __builtin_prefetch(&record->native->last);
  __builtin_prefetch(&record->native->ready);
  __builtin_prefetch(field_of(driver.executable, record->graph));
  __builtin_prefetch(field_of(driver.hits, record->entry));
  ++record->users;
  return record;
}

// New outputs in `made`, and where they lie; NULL where the allocator aligns to less than is needed.
static Outcome make_outputs(Graph *graph, PyObject **made, uint64_t *addresses) {
  OWNED PyObject *fresh = PyList_New((Py_ssize_t)graph->outputs);
  if (fresh == NULL) return FAILED;
  for (size_t i = 0; i < graph->outputs; ++i) {
    PyObject *maker = PyTuple_GET_ITEM(graph->makers, (Py_ssize_t)i);
    PyObject *each = PyObject_Call(PyTuple_GET_ITEM(maker, 0), PyTuple_GET_ITEM(maker, 1), NULL);
    if (each == NULL) return FAILED;
    PyList_SET_ITEM(fresh, (Py_ssize_t)i, each);
    if (plain_device(each) == NOT_PLAIN || !is_usable(each, graph->places[graph->inputs + i].mask, addresses + i))
      return DONE;
  }
  *made = Py_NewRef(fresh);
  return DONE;
}

// The outputs of this call: those that lie ready, or new ones; NULL where the allocator aligns to less than is needed.
static Outcome take_outputs(Graph *graph, uint64_t stream, PyObject **outputs, uint64_t *addresses) {
  OWNED PyObject *ready = graph->ready;
  graph->ready = NULL;
  if (ready == NULL || graph->ready_stream != stream || graph->ready_inference != is_inference())
    return make_outputs(graph, outputs, addresses);
  memcpy(addresses, graph->ready_at, graph->outputs * sizeof *addresses);
  *outputs = Py_NewRef(ready);
  return DONE;
}

// The outputs of the next call. This call has its answer: no memory and no driver that agrees are the next one's to say.
static Outcome prepare_next(Graph *graph, Lock *lock, uint64_t stream) {
  OWNED PyObject *fresh = NULL;
  uint64_t addresses[MOST_OUTPUTS];
  if (make_outputs(graph, &fresh, addresses) != DONE || (fresh != NULL && launched(graph, lock, addresses) != DONE)) {
    if (!PyErr_ExceptionMatches(driver.quiet)) return FAILED;
    PyErr_Clear();
    return DONE;
  }
  Py_XSETREF(graph->ready, Py_XNewRef(fresh));
  memcpy(graph->ready_at, addresses, sizeof addresses);
  graph->ready_stream = stream;
  graph->ready_inference = is_inference();
  return DONE;
}

// With the order's lock: whether the graph is there, and ran last on this stream, and the engine is of the same epoch.
static Outcome may_replay(const Record *record, uint64_t stream) {
  if (!is_current(record->graph, record->order, stream)) return LEFT_ALONE;
  if (record->engine == NULL) return DONE;
  // Where nn.Module would find it in the end.
  OWNED PyObject *attributes = PyObject_GenericGetDict(record->engine, NULL);
  if (attributes == NULL) return FAILED;
  static PyObject *name;
  if (name == NULL && (name = PyUnicode_InternFromString("epoch")) == NULL) return FAILED;
  PyObject *epoch = PyDict_GetItemWithError(attributes, name);
  if (epoch == NULL) return PyErr_Occurred() ? FAILED : LEFT_ALONE;
  const int same = PyObject_RichCompareBool(epoch, record->epoch, Py_EQ);
  return same < 0 ? FAILED : same == 0 ? LEFT_ALONE : DONE;
}

// Whether native code sees that nothing has changed since a graph was proven, which is what ModuleGuard.stale_since()
// tells; otherwise Python is asked. The version last: with another one, the module was found as it is now.
static int is_unchanged(const Record *record) {
  if (record->ambient == NULL || !holds((Guard *)record->ambient)) return 0;
  PyObject *known = *field_of(driver.proven, record->guard);
  if (known == NULL || !is_of(driver.compared, known)) return 0;
  OWNED PyObject *compared = Py_XNewRef(*field_of(driver.compared, known));
  if (compared == NULL || !Py_IS_TYPE(compared, guard_type) || !holds((Guard *)compared)) return 0;
  return number_in(driver.version, record->guard) == record->version;
}

// Whether a module is what it was when the graph was proven; an engine's epoch is compared with the lock held.
static Outcome check_module(const Record *record) {
  if (record->is_stale == NULL || is_unchanged(record)) return DONE;
  OWNED PyObject *stale = PyObject_CallOneArg(record->is_stale, Py_False);
  const int is = stale == NULL ? -1 : PyObject_IsTrue(stale);
  return is < 0 ? FAILED : is != 0 ? LEFT_ALONE : DONE;
}

// This was a hit.
static Outcome count_hit(const Record *record) {
  PyObject *now = PyIter_Next(driver.counter);
  PyObject *more = now == NULL ? NULL : PyLong_FromUnsignedLongLong(number_in(driver.hits, record->entry) + 1);
  if (more == NULL) {
    Py_XDECREF(now);
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "the counter of uses has ended");
    return FAILED;
  }
  put_in(driver.hits, record->entry, more);
  put_in(driver.used, record->entry, now);
  return DONE;
}

// With the order's lock: point, launch, and do what can be done while the device works. Without outputs new ones are
// taken, which the caller's are otherwise.
static Outcome replay(const Record *record, uint64_t stream, uint64_t *addresses, PyObject **outputs) {
  Graph *graph = record->native;
  Outcome outcome = may_replay(record, stream);
  if (outcome != DONE) return outcome;
  if (outputs != NULL) {
    outcome = take_outputs(graph, stream, outputs, addresses + graph->inputs);
    if (outcome != DONE || *outputs == NULL) return outcome == DONE ? LEFT_ALONE : outcome;
  }
  if ((outcome = aim(graph, record->lock, addresses)) != DONE) return outcome;
  if ((outcome = launch(graph->executables[graph->expected].handle, stream)) != DONE) return outcome;
  return outputs != NULL ? prepare_next(graph, record->lock, stream) : launched(graph, record->lock, NULL);
}

static Outcome replay_locked(const Record *record, uint64_t stream, uint64_t *addresses, PyObject **outputs) {
  const int held = hold(record->lock);
  if (held <= 0) return held < 0 ? FAILED : LEFT_ALONE;
  const Outcome outcome = replay(record, stream, addresses, outputs);
  let_go(record->lock);
  return outcome;
}

static int are_usable(const Graph *graph, PyObject *const *tensors, uint64_t *addresses) {
  for (size_t i = 0; i < graph->inputs; ++i)
    if (!is_usable(tensors[i], graph->places[i].mask, addresses + i)) return 0;
  return 1;
}

static PyObject *as_tuple(PyObject *const *items, Py_ssize_t count) {
  PyObject *made = PyTuple_New(count);
  for (Py_ssize_t i = 0; made != NULL && i < count; ++i) PyTuple_SET_ITEM(made, i, Py_NewRef(items[i]));
  return made;
}

// Whether an input lies in some memory.
static int reads(const Graph *graph, const uint64_t *addresses, uint64_t start, uint64_t end) {
  for (size_t i = 0; i < graph->inputs; ++i)
    if (addresses[i] < end && start < addresses[i] + graph->places[i].nbytes) return 1;
  return 0;
}

// Whether an input, which is copied, lies in state that the graph updates.
static int reads_state(const Record *record, const uint64_t *addresses) {
  const uint64_t *state = (const uint64_t *)(void *)PyBytes_AS_STRING(record->updates);
  for (Py_ssize_t i = 0; i + 1 < PyBytes_GET_SIZE(record->updates) / 8; i += 2)
    if (reads(record->native, addresses, state[i], state[i + 1])) return 1;
  return 0;
}

// Whether a graph may write its only output into a tensor: it lies as the graph's own does, and apart from what is read.
static int fits(const Graph *graph, PyObject *out, uint64_t *addresses) {
  Words words;
  words.count = 0;
  if (!describe_one(out, &words) || !same_words(graph->target, graph->target_words, &words) ||
      !same_property(out, driver.requires_grad, Py_False) ||
      !is_usable(out, graph->places[graph->inputs].mask, addresses + graph->inputs))
    return 0;
  const uint64_t written = addresses[graph->inputs];
  return !reads(graph, addresses, written, written + graph->places[graph->inputs].nbytes);
}

// The answer of a graph, which has made its outputs.
static PyObject *build_answer(const Record *record, PyObject *outputs, PyObject *const *args, Py_ssize_t count) {
  if (record->build == NULL) return Py_NewRef(PyList_GET_ITEM(outputs, 0));
  OWNED PyObject *given = as_tuple(args, count);
  return given == NULL ? NULL : PyObject_CallFunctionObjArgs(record->build, outputs, given, NULL);
}

// The answer to some arguments, written into `out` unless that is NULL.
static Outcome answer(Table *table, PyObject *out, PyObject *const *args, Py_ssize_t count, PyObject **result) {
  Words words;
  if (!nothing_special() || !describe(args, count, &words)) return LEFT_ALONE;
  USING Record *record = find(table, &words);
  if (record == NULL || (out != NULL && (record->build != NULL || record->native->outputs != 1))) return LEFT_ALONE;
  uint64_t stream = 0, addresses[MOST_PLACES];
  Outcome outcome = may_launch(&record->device, &stream);
  if (outcome != DONE) return outcome;
  if (!are_usable(record->native, args, addresses) || reads_state(record, addresses)) return LEFT_ALONE;
  if (out != NULL && !fits(record->native, out, addresses)) return LEFT_ALONE;
  // Asked before a launch that cannot be taken back, as it writes into memory of the caller's or state of the module's;
  // otherwise while the device works: what a stale graph wrote is dropped.
  const int first = out != NULL || PyBytes_GET_SIZE(record->updates) != 0;
  if (first && (outcome = check_module(record)) != DONE) return outcome;
  OWNED PyObject *outputs = NULL;
  if ((outcome = replay_locked(record, stream, addresses, out != NULL ? NULL : &outputs)) != DONE) return outcome;
  OWNED PyObject *answer = out != NULL ? Py_NewRef(out) : build_answer(record, outputs, args, count);
  if (answer == NULL) return FAILED;
  if (!first && (outcome = check_module(record)) != DONE) return outcome;
  if ((outcome = count_hit(record)) != DONE) return outcome;
  *result = Py_NewRef(answer);
  return DONE;
}
