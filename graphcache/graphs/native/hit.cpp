// The short way of a hit, compiled: what graphcache/graphs/single.py and CachedModule.__call__ do in Python.
//
// There is one source of truth, the Python objects. Which outputs are ready, on which stream a lane ran last: all of it
// stands in __slots__ of CudaGraph, Lane and Entry, and is read and written here at the offsets that their member
// descriptors name; where a graph's executables point stands in the table of executables.py. So the general way, in
// Python, may run between any two calls.
//
// A Table holds records by the layout of the inputs. call() and into() either answer, or raise what the Python way
// raises, or return None / False with nothing changed; whoever called then takes the Python way. What decides is asked
// before the launch. The exception is the callable that looks at a module's parameters (is_stale), which is called
// while the device works; then the launch was in vain, as on the Python way.
//
// The GIL is held throughout, but for cuGraphLaunch, which blocks while the launch queue is full. The lane's lock is
// held from the first look at the graph to the last change of it.
//
// CUDA's headers and libraries are not needed: the addresses of four driver functions come from Python.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#ifdef Py_GIL_DISABLED
#error "not for free-threaded Python: the GIL guards what is read and written here"
#endif

#include <ATen/EmptyTensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

// ATen/functorch/DynamicLayer.h wants a header that torch does not ship. Whether the stack is empty needs no more.
namespace at::functorch {
struct DynamicLayer;
TORCH_API const std::vector<DynamicLayer>& getDynamicLayerStack();
}  // namespace at::functorch

namespace {

using Ref = THPObjectPtr;
using Words = c10::SmallVector<uint64_t, 64>;

constexpr Py_ssize_t most_inputs = 8, most_outputs = 8, most_places = most_inputs + most_outputs;
constexpr uint64_t unknown = ~uint64_t{0}, looks_every = 16;

// The driver's functions, by what the C interface of CUDA 12 says of them; a CUresult is an int.
using Launch = int (*)(void* executable, void* stream);
using SetKernel = int (*)(void* executable, void* node, const void* params);
using SetCopy = int (*)(void* executable, void* node, const void* params, void* context);
using IsCapturing = int (*)(void* stream, int* status);

// ---- attributes of Python objects

// An attribute that stands in __slots__ of a class.
struct Field {
  PyTypeObject* type = nullptr;  // Borrowed: the table holds its classes.
  Py_ssize_t offset = 0;

  bool find(PyObject* cls, const char* name) {
    Ref descriptor(PyObject_GetAttrString(cls, name));
    if (!descriptor) return false;
    if (!PyType_Check(cls) || !Py_IS_TYPE(descriptor.get(), &PyMemberDescr_Type)) {
      PyErr_Format(PyExc_TypeError, "%R has no slot %s", cls, name);
      return false;
    }
    const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(descriptor.get())->d_member;
    if (member->type != T_OBJECT_EX || (member->flags & READONLY)) {
      PyErr_Format(PyExc_TypeError, "%s of %R is no plain slot", name, cls);
      return false;
    }
    type = PyDescr_TYPE(descriptor.get());
    offset = member->offset;
    return true;
  }

  bool is_of(PyObject* object) const { return PyObject_TypeCheck(object, type); }

  PyObject*& in(PyObject* object) const {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
  }

  // Takes over the reference to the value.
  void put(PyObject* object, PyObject* value) const {
    PyObject*& place = in(object);
    PyObject* before = place;
    place = value;
    Py_XDECREF(before);
  }

  // A whole number as it stands there: -1, and whatever is none, are no address and no stream.
  uint64_t number(PyObject* object) const {
    PyObject* value = in(object);
    if (value == nullptr || !PyLong_CheckExact(value)) return unknown;
    const uint64_t found = PyLong_AsUnsignedLongLongMask(value);
    if (found == unknown) PyErr_Clear();
    return found;
  }
};

// ---- tensors

// No gradients, no autocast, no modes, no transforms, no tracing.
bool nothing_special() {
  return !c10::GradMode::is_enabled() &&
      c10::impl::tls_local_dispatch_key_set().excluded_.has_all(c10::autocast_dispatch_keyset) &&
      c10::impl::TorchDispatchModeTLS::stack_len() == 0 && at::functorch::getDynamicLayerStack().empty() &&
      !torch::jit::tracer::isTracing();
}

// The tensor in an object that is a torch.Tensor itself, plain and dense, on a GPU or on the CPU; otherwise null. Its
// dispatch keys say it all: any layout but strided, pending conjugation or negation, a subclass, a wrapper of a
// transform or a fake have a key more.
c10::TensorImpl* plain(PyObject* object) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != THPVariableClass) return nullptr;
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

// What describe_layout() in cache/signature.py says, as numbers; false for what it says nothing of.
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

// ---- the lock of a lane

// What threading.RLock is, but that whether it is free is a question of the GIL alone: without it nobody looks or writes.
// Who has to wait sleeps at a gate, which is closed but for the moment in which somebody is let through.
struct Lock {
  PyObject_HEAD
  unsigned long owner;
  Py_ssize_t count, waiting;
  bool called;
  PyThread_type_lock gate;

  bool take() {
    const unsigned long me = PyThread_get_thread_ident();
    if (count != 0 && owner != me) return false;
    owner = me;
    ++count;
    return true;
  }

  void wait() {
    while (!take()) {
      ++waiting;
      Py_BEGIN_ALLOW_THREADS
      PyThread_acquire_lock(gate, WAIT_LOCK);
      Py_END_ALLOW_THREADS
      --waiting;
      called = false;
    }
  }

  bool give_back() {
    if (count == 0 || owner != PyThread_get_thread_ident()) return false;
    if (--count == 0 && waiting != 0 && !called) {
      called = true;
      PyThread_release_lock(gate);
    }
    return true;
  }
};

PyTypeObject* lock_type;

PyObject* lock_new(PyTypeObject* type, PyObject* given, PyObject* names) {
  if (PyTuple_GET_SIZE(given) != 0 || (names != nullptr && PyDict_GET_SIZE(names) != 0))
    return PyErr_Format(PyExc_TypeError, "Lock() takes no arguments");
  auto* made = reinterpret_cast<Lock*>(type->tp_alloc(type, 0));
  if (made == nullptr) return nullptr;
  made->gate = PyThread_allocate_lock();
  if (made->gate == nullptr) {
    Py_DECREF(made);
    return PyErr_NoMemory();
  }
  PyThread_acquire_lock(made->gate, NOWAIT_LOCK);
  return reinterpret_cast<PyObject*>(made);
}

void lock_dealloc(PyObject* self) {
  auto* lock = reinterpret_cast<Lock*>(self);
  if (lock->gate != nullptr) {
    PyThread_release_lock(lock->gate);
    PyThread_free_lock(lock->gate);
  }
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* lock_acquire(PyObject* self, PyObject* given) {
  int blocking = 1;
  if (!PyArg_ParseTuple(given, "|p:acquire", &blocking)) return nullptr;
  auto* lock = reinterpret_cast<Lock*>(self);
  if (!blocking) return PyBool_FromLong(lock->take());
  lock->wait();
  Py_RETURN_TRUE;
}

PyObject* lock_enter(PyObject* self, PyObject*) {
  reinterpret_cast<Lock*>(self)->wait();
  Py_RETURN_TRUE;
}

PyObject* lock_release(PyObject* self, PyObject*) {
  if (reinterpret_cast<Lock*>(self)->give_back()) Py_RETURN_NONE;
  return PyErr_Format(PyExc_RuntimeError, "this thread does not hold the lock that it releases");
}

PyObject* lock_exit(PyObject* self, PyObject* const*, Py_ssize_t) { return lock_release(self, nullptr); }

PyMethodDef lock_methods[] = {
    {"acquire", lock_acquire, METH_VARARGS, "Take it; whether it was taken. Waits unless told not to."},
    {"release", lock_release, METH_NOARGS, "Give it back, as often as it was taken."},
    {"__enter__", lock_enter, METH_NOARGS, nullptr},
    {"__exit__", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(lock_exit)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot lock_slots[] = {{Py_tp_new, reinterpret_cast<void*>(lock_new)},
                            {Py_tp_dealloc, reinterpret_cast<void*>(lock_dealloc)},
                            {Py_tp_methods, lock_methods},
                            {0, nullptr}};

PyType_Spec lock_spec = {"_graphcache_hit.Lock", sizeof(Lock), 0, Py_TPFLAGS_DEFAULT, lock_slots};

// ---- what is known of a graph

// A place in the graph where an address stands, as pointers.py found it.
struct Pointer {
  bool kernel;
  void *node, *params, *context;
  uint64_t* word;
  uint64_t offset;
};

// An input or output. The graph's inputs and outputs, held by the record, hold the memory behind the pointers.
struct Place {
  uint64_t mask;
  uint64_t nbytes;
  std::vector<Pointer> pointers;
};

// The head of the table of executables, and what stands in one of its rows.
enum Head : size_t { count_of, expected, last, hand, streak, alone, most_of_them, grows, patience, head };
enum Row : size_t { handle_of, next_of, addresses_of };

// How to allocate an output: by a callable, or from the allocator that the static buffer came from.
struct Maker {
  PyObject* callable = nullptr;  // Held by the record.
  c10::Allocator* allocator = nullptr;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  c10::SmallVector<int64_t, 8> sizes, strides;
  c10::DispatchKeySet keys;
};

struct Record {
  Words words;
  size_t users = 0;  // Guarded by the GIL, as everything here.
  std::vector<Ref> held;  // Everything borrowed below.
  Lock* lock;
  PyObject *entry, *graph, *lane, *executables, *executables_table, *index;
  int device;
  PyObject *engine, *epoch, *is_stale, *build;  // Null where there is none.
  // Who shows what the graph has written, its lock, and what makes what is shown; null where answers are fresh tensors.
  PyObject *views, *show;
  Lock* views_lock;
  uint64_t* table;  // Of the executables; executables.py says what stands where.
  std::vector<Place> places;  // Inputs, then outputs.
  size_t inputs;
  std::vector<Maker> makers;
  Words target;  // The layout of the only output.

  PyObject* hold(PyObject* object) {
    held.emplace_back(Py_NewRef(object));
    return object;
  }

  PyObject* hold_unless_none(PyObject* object) { return object == Py_None ? nullptr : hold(object); }

  size_t outputs() const { return places.size() - inputs; }
  uint64_t* row(uint64_t index) const { return table + head + index * (addresses_of + places.size()); }
  uint64_t* addresses(uint64_t index) const { return row(index) + addresses_of; }
};

// A record in use. One that is used by nobody else goes with it.
class Using {
 public:
  explicit Using(Record* record = nullptr) : record_(record) {
    if (record_ != nullptr) ++record_->users;
  }
  Using(Using&& other) noexcept : record_(std::exchange(other.record_, nullptr)) {}
  Using& operator=(Using&& other) noexcept {
    std::swap(record_, other.record_);
    return *this;
  }
  ~Using() {
    if (record_ != nullptr && --record_->users == 0) delete record_;
  }
  Record& operator*() const { return *record_; }
  Record* operator->() const { return record_; }
  explicit operator bool() const { return record_ != nullptr; }

 private:
  Record* record_;
};

PyObject* make(const Maker& maker) {
  HANDLE_TH_ERRORS
  if (maker.callable != nullptr) return PyObject_CallNoArgs(maker.callable);
  return THPVariable_Wrap(
      at::detail::empty_strided_generic(maker.sizes, maker.strides, maker.allocator, maker.keys, maker.dtype));
  END_HANDLE_TH_ERRORS
}

// Fails if the object is no plain tensor of a caching allocator.
bool make_as(PyObject* buffer, Maker& maker) {
  c10::TensorImpl* tensor = plain(buffer);
  if (tensor == nullptr || (maker.allocator = tensor->unsafe_storage().allocator()) == nullptr) return false;
  maker.dtype = tensor->dtype().toScalarType();
  maker.sizes = tensor->sizes();
  maker.strides = tensor->strides();
  maker.keys = c10::DispatchKeySet(tensor->is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
  return true;
}

// ---- the table

struct State {
  Ref classes, modes, counter, raw_stream, current_device, fail, quiet, epoch_name;
  Field executables, ready, ready_stream, ready_inference, stream, last, hits, used, off, shown, replays, shown_on;
  // What torch keeps of streams itself, null if raw_stream is to be asked, and the stream that it was asked for last.
  const c10::impl::DeviceGuardImplInterface* streams = nullptr;
  c10::StreamId known_id = 0;
  int known_device = -1;
  uint64_t known_stream = 0;
  Launch launch;
  SetKernel set_kernel;
  SetCopy set_copy;
  IsCapturing is_capturing;
  std::unordered_multimap<uint64_t, Using> records;
};

struct Table {
  PyObject_HEAD
  State* state;
};

// A lane's lock, taken without waiting and given back at the end.
class Held {
 public:
  explicit Held(Lock& lock) : lock_(lock), held_(lock.take()) {}
  ~Held() {
    if (held_) lock_.give_back();
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  explicit operator bool() const { return held_; }

 private:
  Lock& lock_;
  const bool held_;
};

enum class Outcome { done, left_alone, failed };

Outcome raise_failure(State& state, const char* name, int code) {
  Ref error(PyObject_CallFunction(state.fail.get(), "si", name, code));
  if (error) PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.get())), error.get());
  return Outcome::failed;
}

// ---- which executable, and where it points: as executables.py does it

size_t differences(const Record& record, uint64_t index, const uint64_t* wanted) {
  const uint64_t* found = record.addresses(index);
  size_t count = 0;
  for (size_t i = 0; i < record.places.size(); ++i) count += found[i] != wanted[i];
  return count;
}

// Point an executable elsewhere. The driver takes a node's parameters as a whole, and several tensors may stand in one.
Outcome point(State& state, const Record& record, uint64_t index, const uint64_t* wanted) {
  uint64_t* found = record.addresses(index);
  void* executable = reinterpret_cast<void*>(record.row(index)[handle_of]);
  bool changed[most_places];
  for (size_t i = 0; i < record.places.size(); ++i) {
    for (const Pointer& pointer : record.places[i].pointers) *pointer.word = wanted[i] + pointer.offset;
    if ((changed[i] = found[i] != wanted[i])) found[i] = unknown;
  }
  for (size_t i = 0; i < record.places.size(); ++i) {
    if (!changed[i]) continue;
    for (const Pointer& pointer : record.places[i].pointers) {
      const int code = pointer.kernel ? state.set_kernel(executable, pointer.node, pointer.params)
                                      : state.set_copy(executable, pointer.node, pointer.params, pointer.context);
      if (code != 0)
        return raise_failure(
            state, pointer.kernel ? "cuGraphExecKernelNodeSetParams" : "cuGraphExecMemcpyNodeSetParams", code);
    }
    found[i] = wanted[i];
  }
  record.table[hand] = (index + 1) % record.table[count_of];
  return Outcome::done;
}

// One was pointed elsewhere, in a graph that was launched before this launch too, or that takes turns with others.
void count(const Record& record, bool again) {
  if (again)
    ++record.table[alone];
  else if (record.table[alone] != 0)
    --record.table[alone];
}

// Expect, for the next launch, the executable that is pointed where it is wanted, or is now. One more executable is made
// in Python.
Outcome aim(State& state, const Record& record, const uint64_t* wanted) {
  uint64_t* table = record.table;
  uint64_t index = table[expected];
  if (differences(record, index, wanted) == 0) {
    table[streak] = 0;
    return Outcome::done;
  }
  size_t least = ~size_t{0};
  const bool full = table[count_of] == table[most_of_them], searches = table[streak] < table[patience];
  if (searches || !full || table[streak] % looks_every == 0)
    for (uint64_t each = 0; each < table[count_of] && least != 0; ++each)
      if (differences(record, each, wanted) == 0) least = 0, index = each;
  if (searches)
    for (uint64_t step = 0; step < table[count_of]; ++step) {
      const uint64_t each = (table[hand] + step) % table[count_of];
      const size_t differs = differences(record, each, wanted);
      if (differs < least) least = differs, index = each;
    }
  if (least != 0) {
    if (!full && table[alone] >= table[grows]) return Outcome::left_alone;
    if (const auto pointed = point(state, record, index, wanted); pointed != Outcome::done) return pointed;
    ++table[streak];
    count(record, state.last.in(record.lane) == record.executables_table);
  } else {
    table[streak] = 0;
  }
  if (index != table[expected]) {
    record.row(table[last])[next_of] = index;
    table[expected] = index;
  }
  return Outcome::done;
}

// The expected executable was launched: expect the one that came after it the last time. Where addresses do not come
// again, or as long as there is but one, it is pointed at the next outputs (null if they are not known) now.
Outcome launched(State& state, const Record& record, const uint64_t* outputs) {
  uint64_t* table = record.table;
  const bool again = state.last.in(record.lane) == record.executables_table;
  if (!again) state.last.put(record.lane, Py_NewRef(record.executables_table));
  table[last] = table[expected];
  const uint64_t following = record.row(table[last])[next_of];
  table[expected] = following;
  if (outputs == nullptr) return Outcome::done;
  uint64_t wanted[most_places];
  std::copy_n(record.addresses(following), record.inputs, wanted);
  std::copy_n(outputs, record.outputs(), wanted + record.inputs);
  if (differences(record, following, wanted) == 0) return Outcome::done;
  const bool full = table[count_of] == table[most_of_them];
  if (full ? table[streak] >= table[patience] : table[count_of] == 1 && table[alone] < table[grows]) {
    const uint64_t index = table[hand];
    std::copy_n(record.addresses(index), record.inputs, wanted);
    if (const auto pointed = point(state, record, index, wanted); pointed != Outcome::done) return pointed;
    count(record, again);
    table[expected] = index;
    return Outcome::done;
  }
  for (uint64_t each = 0; each < table[count_of]; ++each)
    if (differences(record, each, wanted) == 0) {
      table[expected] = each;
      break;
    }
  return Outcome::done;
}

Outcome launch(State& state, uint64_t executable, uint64_t stream) {
  int code;
  Py_BEGIN_ALLOW_THREADS
  code = state.launch(reinterpret_cast<void*>(executable), reinterpret_cast<void*>(stream));
  Py_END_ALLOW_THREADS
  return code == 0 ? Outcome::done : raise_failure(state, "cuGraphLaunch", code);
}

Outcome launch(State& state, const Record& record, uint64_t stream) {
  return launch(state, record.row(record.table[expected])[handle_of], stream);
}

// New outputs, and where they lie: done, with none where the allocator aligns to less than is needed, or failed.
Outcome make_outputs(const Record& record, Ref& made, uint64_t* addresses) {
  const size_t count = record.outputs();
  Ref fresh(PyList_New(static_cast<Py_ssize_t>(count)));
  if (!fresh) return Outcome::failed;
  for (size_t i = 0; i < count; ++i) {
    PyObject* each = make(record.makers[i]);
    if (each == nullptr) return Outcome::failed;
    PyList_SET_ITEM(fresh.get(), static_cast<Py_ssize_t>(i), each);
    c10::TensorImpl* tensor = plain(each);
    addresses[i] = tensor == nullptr ? 0 : address_of(tensor);
    if (addresses[i] == 0 || (addresses[i] & record.places[record.inputs + i].mask) != 0) return Outcome::done;
  }
  made = std::move(fresh);
  return Outcome::done;
}

// The outputs of the next call. This call has its answer: no memory and no driver that agrees are the next one's to say.
Outcome prepare_next(State& state, const Record& record) {
  uint64_t addresses[most_places];
  Ref fresh;
  if (make_outputs(record, fresh, addresses) != Outcome::done ||
      (fresh && launched(state, record, addresses) != Outcome::done)) {
    if (!PyErr_ExceptionMatches(state.quiet.get())) return Outcome::failed;
    PyErr_Clear();
    return Outcome::done;
  }
  if (fresh) state.ready.put(record.graph, fresh.release());
  return Outcome::done;
}

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

// Whether the call may go on: what the caller's context forbids, asked without touching anything.
Outcome may_launch(State& state, const Record& record, uint64_t* stream) {
  PyObject* found = nullptr;
  if (PyContextVar_Get(state.modes.get(), nullptr, &found) < 0) return Outcome::failed;
  Ref modes(found);
  if (!modes || !state.off.is_of(modes.get()) || state.off.in(modes.get()) != Py_False) return Outcome::left_alone;
  if (const auto known = current_stream(state, record.index, record.device, stream); known != Outcome::done)
    return known;
  // The legacy default stream: whose it is has to be asked, in Python.
  if (*stream == 0) return Outcome::left_alone;
  if (state.current_device) {
    Ref device(PyObject_CallNoArgs(state.current_device.get()));
    if (!device) return Outcome::failed;
    const int same = PyObject_RichCompareBool(device.get(), record.index, Py_EQ);
    if (same <= 0) return same < 0 ? Outcome::failed : Outcome::left_alone;
  }
  int status = 0;
  const bool idle = state.is_capturing(reinterpret_cast<void*>(*stream), &status) == 0 && status == 0;
  return idle ? Outcome::done : Outcome::left_alone;
}

// With the lane's lock: whether the graph is there, of this epoch, and ran last on this stream.
Outcome is_current(State& state, const Record& record, uint64_t stream) {
  if (state.executables.in(record.graph) != record.executables) return Outcome::left_alone;
  if (state.stream.number(record.lane) != stream) return Outcome::left_alone;
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

bool are_usable(const Record& record, c10::TensorImpl* const* tensors, uint64_t* addresses) {
  for (size_t i = 0; i < record.inputs; ++i) {
    addresses[i] = address_of(tensors[i]);
    if (addresses[i] == 0 || (addresses[i] & record.places[i].mask) != 0) return false;
  }
  return true;
}

// After the launch, without the lock: whether the parameters are where they were, and then that this was a hit.
Outcome finish(State& state, const Record& record) {
  if (record.is_stale != nullptr) {
    Ref stale(PyObject_CallOneArg(record.is_stale, Py_False));
    const int is = stale ? PyObject_IsTrue(stale.get()) : -1;
    if (is != 0) return is < 0 ? Outcome::failed : Outcome::left_alone;
  }
  Ref more(PyLong_FromUnsignedLongLong(state.hits.number(record.entry) + 1));
  Ref now(PyIter_Next(state.counter.get()));
  if (!more || !now) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "the counter of uses has ended");
    return Outcome::failed;
  }
  state.hits.put(record.entry, more.release());
  state.used.put(record.entry, now.release());
  return Outcome::done;
}

PyObject* as_tuple(PyObject* const* items, Py_ssize_t count) {
  PyObject* made = PyTuple_New(count);
  if (made != nullptr)
    for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SET_ITEM(made, i, Py_NewRef(items[i]));
  return made;
}

// A use of its own: whoever clears the table meanwhile takes nothing from under the call.
Using find(State& state, const Words& words) {
  const auto [first, last] = state.records.equal_range(hash_of(words));
  for (auto each = first; each != last; ++each)
    if (each->second->words == words) {
      Record& found = *each->second;
      // With many graphs in turn nothing of one is left in the caches: what is read next comes at once, not one by one.
      __builtin_prefetch(found.table);
      __builtin_prefetch(found.table + 8);
      __builtin_prefetch(found.places.data());
      __builtin_prefetch(&state.executables.in(found.graph));
      __builtin_prefetch(&state.hits.in(found.entry));
      return Using(&found);
    }
  return Using();
}

bool overlaps(const Record& record, const uint64_t* addresses, size_t output) {
  const uint64_t written = addresses[output], end = written + record.places[output].nbytes;
  for (size_t i = 0; i < record.inputs; ++i)
    if (addresses[i] < end && written < addresses[i] + record.places[i].nbytes) return true;
  return false;
}

// A replay into the tensors that Views shows, as its replay() does it. No launch where an answer is fed back.
Outcome answer_in_place(State& state, const Record& record, uint64_t stream, uint64_t* addresses, Ref& outputs) {
  Ref number;
  {
    Held views(*record.views_lock), lock(*record.lock);
    if (!views || !lock) return Outcome::left_alone;
    if (const auto current = is_current(state, record, stream); current != Outcome::done) return current;
    PyObject* shown = state.shown.in(record.views);
    if (shown == nullptr || !PyList_CheckExact(shown) || state.shown_on.number(record.views) != stream ||
        PyList_GET_SIZE(shown) != static_cast<Py_ssize_t>(record.outputs()))
      return Outcome::left_alone;
    for (size_t i = 0; i < record.outputs(); ++i) {
      c10::TensorImpl* tensor = plain(PyList_GET_ITEM(shown, static_cast<Py_ssize_t>(i)));
      if (tensor == nullptr) return Outcome::left_alone;
      addresses[record.inputs + i] = address_of(tensor);
      if (overlaps(record, addresses, record.inputs + i)) return Outcome::left_alone;
    }
    if (const auto aimed = aim(state, record, addresses); aimed != Outcome::done) return aimed;
    number = PyLong_FromUnsignedLongLong(state.replays.number(record.views) + 1);
    if (!number) return Outcome::failed;
    // Before the launch: nobody may read what is about to change.
    state.replays.put(record.views, Py_NewRef(number.get()));
    if (const auto begun = launch(state, record, stream); begun != Outcome::done) return begun;
    if (const auto noted = launched(state, record, nullptr); noted != Outcome::done) return noted;
  }
  outputs = PyObject_CallOneArg(record.show, number.get());
  if (!outputs) return Outcome::failed;
  if (PyList_CheckExact(outputs.get()) && PyList_GET_SIZE(outputs.get()) != 0) return Outcome::done;
  PyErr_SetString(PyExc_TypeError, "expected a list of views");
  return Outcome::failed;
}

// A replay into fresh tensors, made while the device worked on the replay before.
Outcome answer_afresh(State& state, const Record& record, uint64_t stream, uint64_t* addresses, Ref& outputs) {
  Held lock(*record.lock);
  if (!lock) return Outcome::left_alone;
  if (const auto current = is_current(state, record, stream); current != Outcome::done) return current;
  PyObject* ready = state.ready.in(record.graph);
  PyObject* inference = c10::InferenceMode::is_enabled() ? Py_True : Py_False;
  if (ready == nullptr || !PyList_CheckExact(ready) ||
      PyList_GET_SIZE(ready) != static_cast<Py_ssize_t>(record.outputs()) ||
      state.ready_stream.number(record.graph) != stream || state.ready_inference.in(record.graph) != inference)
    return Outcome::left_alone;
  for (size_t i = 0; i < record.outputs(); ++i) {
    c10::TensorImpl* tensor = plain(PyList_GET_ITEM(ready, static_cast<Py_ssize_t>(i)));
    if (tensor == nullptr) return Outcome::left_alone;
    addresses[record.inputs + i] = address_of(tensor);
  }
  outputs = Py_NewRef(ready);
  if (const auto aimed = aim(state, record, addresses); aimed != Outcome::done) return aimed;
  if (const auto begun = launch(state, record, stream); begun != Outcome::done) return begun;
  // What remains is done while the device works.
  state.ready.put(record.graph, Py_NewRef(Py_None));
  return prepare_next(state, record);
}

// The answer to some arguments. They are a tuple too, or become one where the answer is built of them.
Outcome answer(State& state, PyObject* const* args, Py_ssize_t count, PyObject* tuple, Ref& result) {
  if (!nothing_special()) return Outcome::left_alone;
  c10::TensorImpl* tensors[most_inputs];
  Words words;
  if (!describe(args, count, tensors, words)) return Outcome::left_alone;
  const Using record = find(state, words);
  if (!record) return Outcome::left_alone;
  uint64_t stream = 0, addresses[most_places];
  if (const auto may = may_launch(state, *record, &stream); may != Outcome::done) return may;
  if (!are_usable(*record, tensors, addresses)) return Outcome::left_alone;
  Ref outputs;
  const auto answered = (record->views == nullptr ? answer_afresh : answer_in_place)(state, *record, stream, addresses, outputs);
  if (answered != Outcome::done) return answered;
  if (record->build == nullptr) {
    result = Py_NewRef(PyList_GET_ITEM(outputs.get(), 0));
  } else {
    Ref made(tuple == nullptr ? as_tuple(args, count) : Py_NewRef(tuple));
    if (!made) return Outcome::failed;
    result = PyObject_CallFunctionObjArgs(record->build, outputs.get(), made.get(), nullptr);
    if (!result) return Outcome::failed;
  }
  return finish(state, *record);
}

// Whether a graph may write its only output into a tensor: it lies as the graph's own does, and apart from what is read.
bool fits(const Record& record, c10::TensorImpl* out, uint64_t* addresses) {
  Words words;
  describe_one(*out, words);
  if (words != record.target || out->requires_grad()) return false;
  const uint64_t written = addresses[record.inputs] = address_of(out);
  return written != 0 && (written & record.places[record.inputs].mask) == 0 && !overlaps(record, addresses, record.inputs);
}

Outcome answer_into(State& state, PyObject* out, PyObject* const* args, Py_ssize_t count) {
  if (!nothing_special()) return Outcome::left_alone;
  c10::TensorImpl *tensors[most_inputs], *target = plain(out);
  Words words;
  if (target == nullptr || !describe(args, count, tensors, words)) return Outcome::left_alone;
  const Using record = find(state, words);
  if (!record || record->build != nullptr || record->outputs() != 1) return Outcome::left_alone;
  uint64_t stream = 0, addresses[most_places];
  if (const auto may = may_launch(state, *record, &stream); may != Outcome::done) return may;
  if (!are_usable(*record, tensors, addresses) || !fits(*record, target, addresses)) return Outcome::left_alone;
  {
    Held lock(*record->lock);
    if (!lock) return Outcome::left_alone;
    if (const auto current = is_current(state, *record, stream); current != Outcome::done) return current;
    if (const auto aimed = aim(state, *record, addresses); aimed != Outcome::done) return aimed;
    if (const auto begun = launch(state, *record, stream); begun != Outcome::done) return begun;
    if (const auto noted = launched(state, *record, nullptr); noted != Outcome::done) return noted;
  }
  return finish(state, *record);
}

// ---- methods

PyObject* table_call(Table* self, PyObject* args) {
  HANDLE_TH_ERRORS
  Ref result;
  if (!PyTuple_CheckExact(args)) Py_RETURN_NONE;
  const auto outcome = answer(*self->state, PySequence_Fast_ITEMS(args), PyTuple_GET_SIZE(args), args, result);
  if (outcome == Outcome::failed) return nullptr;
  return outcome == Outcome::done ? result.release() : Py_NewRef(Py_None);
  END_HANDLE_TH_ERRORS
}

PyObject* table_into(Table* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 2) return PyErr_Format(PyExc_TypeError, "into() takes 2 arguments, %zd were given", count);
  if (!PyTuple_CheckExact(given[1])) Py_RETURN_FALSE;
  const auto outcome =
      answer_into(*self->state, given[0], PySequence_Fast_ITEMS(given[1]), PyTuple_GET_SIZE(given[1]));
  if (outcome == Outcome::failed) return nullptr;
  return PyBool_FromLong(outcome == Outcome::done);
  END_HANDLE_TH_ERRORS
}

void* pointer_of(PyObject* number) { return PyLong_AsVoidPtr(number); }

bool is_tuple(PyObject* object) {
  if (PyTuple_Check(object)) return true;
  PyErr_Format(PyExc_TypeError, "expected a tuple, got %R", Py_TYPE(object));
  return false;
}

// (mask, nbytes, ((kernel, node, params, context, word, offset), ...))
bool read_place(PyObject* given, Place& place) {
  PyObject* pointers;
  if (!is_tuple(given) ||
      !PyArg_ParseTuple(given, "KKO!:place", &place.mask, &place.nbytes, &PyTuple_Type, &pointers))
    return false;
  if (PyTuple_GET_SIZE(pointers) == 0) {
    PyErr_SetString(PyExc_TypeError, "expected pointers");
    return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(pointers); ++i) {
    int kernel;
    PyObject *node, *params, *context, *word;
    long long offset;
    if (!is_tuple(PyTuple_GET_ITEM(pointers, i)) ||
        !PyArg_ParseTuple(PyTuple_GET_ITEM(pointers, i), "pOOOOL:pointer", &kernel, &node, &params, &context, &word,
                          &offset))
      return false;
    place.pointers.push_back({kernel != 0, pointer_of(node), pointer_of(params), pointer_of(context),
                              static_cast<uint64_t*>(pointer_of(word)), static_cast<uint64_t>(offset)});
    if (PyErr_Occurred()) return false;
  }
  return true;
}

// The table of the executables: an array of 64-bit numbers, as long as its head and rows say.
bool read_table(PyObject* given, Record& record) {
  Py_buffer view;
  if (PyObject_GetBuffer(given, &view, PyBUF_CONTIG) < 0) return false;
  const auto length = static_cast<size_t>(view.len) / sizeof(uint64_t);
  record.table = static_cast<uint64_t*>(view.buf);
  const bool fits = view.itemsize == sizeof(uint64_t) && length >= head &&
      record.table[count_of] >= 1 && record.table[count_of] <= record.table[most_of_them] &&
      record.table[most_of_them] <= (length - head) / (addresses_of + record.places.size());
  PyBuffer_Release(&view);
  if (!fits) PyErr_SetString(PyExc_TypeError, "that is no table of executables");
  return fits;
}

// A device's index, or -1 for what is none.
int device_of(PyObject* index) {
  const long found = PyLong_CheckExact(index) ? PyLong_AsLong(index) : -1;
  if (found == -1) PyErr_Clear();
  return found >= 0 && found < 128 ? static_cast<int>(found) : -1;
}

PyObject* table_put(Table* self, PyObject* given) {
  HANDLE_TH_ERRORS
  State& state = *self->state;
  PyObject *args, *entry, *graph, *lane, *lock, *executables, *table, *index, *engine, *epoch, *is_stale, *build, *slots;
  PyObject *views, *views_lock, *show, *places, *buffers, *makers;
  if (!PyArg_ParseTuple(given, "O!OOOOOOOOOOOO(OOO)O!O!O!:put", &PyTuple_Type, &args, &entry, &graph, &lane, &lock,
                        &executables, &table, &index, &engine, &epoch, &is_stale, &build, &slots, &views, &views_lock,
                        &show, &PyTuple_Type, &places, &PyTuple_Type, &buffers, &PyTuple_Type, &makers))
    return nullptr;
  if (!state.hits.is_of(entry) || !state.executables.is_of(graph) || !state.stream.is_of(lane))
    return PyErr_Format(PyExc_TypeError, "expected an Entry, a CudaGraph and a Lane");
  if (views != Py_None && !state.shown.is_of(views)) return PyErr_Format(PyExc_TypeError, "expected Views");
  // What was made before there was a library has a lock of Python's.
  if (!Py_IS_TYPE(lock, lock_type) || (views != Py_None && !Py_IS_TYPE(views_lock, lock_type))) Py_RETURN_FALSE;
  Using record(new Record);
  c10::TensorImpl* tensors[most_inputs];
  const Py_ssize_t count = PyTuple_GET_SIZE(buffers);
  if (!describe(args, tensors, record->words) || count < 1 || count > most_outputs ||
      PyTuple_GET_SIZE(places) != PyTuple_GET_SIZE(args) + count || PyTuple_GET_SIZE(makers) != count)
    Py_RETURN_FALSE;
  record->entry = record->hold(entry);
  record->graph = record->hold(graph);
  record->lane = record->hold(lane);
  record->lock = reinterpret_cast<Lock*>(record->hold(lock));
  record->executables = record->hold(executables);
  record->executables_table = record->hold(table);
  record->hold(slots);
  record->index = record->hold(index);
  record->device = device_of(index);
  if (engine != Py_None && epoch == Py_None) return PyErr_Format(PyExc_TypeError, "an engine without an epoch");
  record->engine = record->hold_unless_none(engine);
  record->epoch = record->hold_unless_none(epoch);
  record->is_stale = record->hold_unless_none(is_stale);
  record->build = record->hold_unless_none(build);
  record->views = record->hold_unless_none(views);
  record->show = record->hold_unless_none(show);
  record->views_lock = reinterpret_cast<Lock*>(record->hold(views_lock));
  record->inputs = static_cast<size_t>(PyTuple_GET_SIZE(args));
  record->places.resize(static_cast<size_t>(PyTuple_GET_SIZE(places)));
  for (size_t i = 0; i < record->places.size(); ++i)
    if (!read_place(PyTuple_GET_ITEM(places, static_cast<Py_ssize_t>(i)), record->places[i])) return nullptr;
  if (!read_table(table, *record)) return nullptr;
  record->makers.resize(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    Maker& maker = record->makers[static_cast<size_t>(i)];
    maker.callable = record->hold_unless_none(PyTuple_GET_ITEM(makers, i));
    if (maker.callable == nullptr && !make_as(PyTuple_GET_ITEM(buffers, i), maker)) Py_RETURN_FALSE;
  }
  c10::TensorImpl* target = plain(PyTuple_GET_ITEM(buffers, 0));
  if (target == nullptr) Py_RETURN_FALSE;
  describe_one(*target, record->target);
  const auto [first, last] = state.records.equal_range(hash_of(record->words));
  for (auto each = first; each != last; ++each)
    if (each->second->words == record->words) {
      each->second = std::move(record);  // What was there goes at the end: that may run any code.
      Py_RETURN_TRUE;
    }
  const uint64_t hash = hash_of(record->words);
  state.records.emplace(hash, std::move(record));
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

int table_clear(Table* self) {
  if (self->state != nullptr) {
    decltype(State::records) gone;
    gone.swap(self->state->records);
  }
  return 0;
}

PyObject* table_clear_method(Table* self, PyObject*) {
  table_clear(self);
  Py_RETURN_NONE;
}

PyObject* table_new(PyTypeObject* type, PyObject* given, PyObject* names) {
  HANDLE_TH_ERRORS
  if (names != nullptr && PyDict_GET_SIZE(names) != 0) return PyErr_Format(PyExc_TypeError, "Table() takes no names");
  PyObject *graph, *lane, *entry, *modes_class, *views, *modes, *counter, *raw_stream, *device, *fail, *quiet;
  int torchs_own;
  unsigned long long launch, set_kernel, set_copy, is_capturing;
  if (!PyArg_ParseTuple(given, "(OOOOO)OOOpOOO(KKKK):Table", &graph, &lane, &entry, &modes_class, &views, &modes,
                        &counter, &raw_stream, &torchs_own, &device, &fail, &quiet, &launch, &set_kernel, &set_copy,
                        &is_capturing))
    return nullptr;
  auto state = std::make_unique<State>();
  if (!state->executables.find(graph, "executables") || !state->ready.find(graph, "ready") ||
      !state->ready_stream.find(graph, "ready_stream") || !state->ready_inference.find(graph, "ready_inference") ||
      !state->stream.find(lane, "stream") || !state->last.find(lane, "last") ||
      !state->hits.find(entry, "hits") || !state->used.find(entry, "used") || !state->off.find(modes_class, "off") ||
      !state->shown.find(views, "shown") || !state->replays.find(views, "replays") ||
      !state->shown_on.find(views, "stream"))
    return nullptr;
  if (!PyContextVar_CheckExact(modes) || !PyIter_Check(counter) || launch == 0 || set_kernel == 0 || set_copy == 0 ||
      is_capturing == 0)
    return PyErr_Format(PyExc_TypeError, "expected a context variable, an iterator and four addresses");
  state->classes = Py_NewRef(PyTuple_GET_ITEM(given, 0));
  state->modes = Py_NewRef(modes);
  state->counter = Py_NewRef(counter);
  state->raw_stream = Py_NewRef(raw_stream);
  if (torchs_own && c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA))
    state->streams = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
  if (device != Py_None) state->current_device = Py_NewRef(device);
  state->fail = Py_NewRef(fail);
  state->quiet = Py_NewRef(quiet);
  state->epoch_name = PyUnicode_InternFromString("epoch");
  if (!state->epoch_name) return nullptr;
  state->launch = reinterpret_cast<Launch>(launch);
  state->set_kernel = reinterpret_cast<SetKernel>(set_kernel);
  state->set_copy = reinterpret_cast<SetCopy>(set_copy);
  state->is_capturing = reinterpret_cast<IsCapturing>(is_capturing);
  auto* made = reinterpret_cast<Table*>(type->tp_alloc(type, 0));
  if (made != nullptr) made->state = state.release();
  return reinterpret_cast<PyObject*>(made);
  END_HANDLE_TH_ERRORS
}

int table_traverse(Table* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (self->state == nullptr) return 0;
  State& state = *self->state;
  for (Ref* ref : {&state.classes, &state.modes, &state.counter, &state.raw_stream, &state.current_device,
                         &state.fail, &state.quiet})
    Py_VISIT(ref->get());
  for (const auto& each : state.records)
    // One that a call is using too is that call's as well, which the collector must not see as nobody's.
    if (each.second->users == 1)
      for (Ref& ref : each.second->held) Py_VISIT(ref.get());
  return 0;
}

void table_dealloc(Table* self) {
  PyObject_GC_UnTrack(self);
  table_clear(self);
  delete self->state;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* table_run(Table* self, PyObject* given);

PyObject* table_length(Table* self, PyObject*) { return PyLong_FromSize_t(self->state->records.size()); }

PyMethodDef table_methods[] = {
    {"call", reinterpret_cast<PyCFunction>(table_call), METH_O, "The answer to a tuple of arguments, or None."},
    {"into", reinterpret_cast<PyCFunction>(table_into), METH_FASTCALL, "Whether out was written, of out and args."},
    {"put", reinterpret_cast<PyCFunction>(table_put), METH_VARARGS, "Remember a graph; whether there is a way for it."},
    {"clear", reinterpret_cast<PyCFunction>(table_clear_method), METH_NOARGS, "Forget every graph."},
    {"run", reinterpret_cast<PyCFunction>(table_run), METH_VARARGS, "What launches a graph on its static buffers."},
    {"count", reinterpret_cast<PyCFunction>(table_length), METH_NOARGS, "How many graphs are known."},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot table_slots[] = {{Py_tp_new, reinterpret_cast<void*>(table_new)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(table_dealloc)},
                             {Py_tp_traverse, reinterpret_cast<void*>(table_traverse)},
                             {Py_tp_clear, reinterpret_cast<void*>(table_clear)},
                             {Py_tp_methods, table_methods},
                             {0, nullptr}};

PyType_Spec table_spec = {"_graphcache_hit.Table", sizeof(Table), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                          table_slots};

// ---- the way in

// Two methods of CachedModule, __call__ and forward_into, are Python functions whose calls come here first. What reads
// their code, such as torch.compile, finds it as it was written, and what is left alone here runs it. Python 3.11 enters
// forward_into by itself where the caller is Python too, so its code asks the table again; _into does not.
struct Doors {
  vectorcallfunc call, into;
  PyObject *hooks, *pre_hooks, *compiler;  // Kept for good, as everything here.
  PyObject *table, *own_hooks, *own_pre_hooks, *compiling, *into_name;
} doors;

PyTypeObject* table_type;

bool holds(PyObject* dict, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(dict, name);
  return found == nullptr || !PyDict_Check(found) || PyDict_GET_SIZE(found) != 0;
}

// The table of a module that has one, with no hooks to be run and nothing being compiled; otherwise null.
PyObject* table_of(PyObject* module) {
  if (PyDict_GET_SIZE(doors.hooks) != 0 || PyDict_GET_SIZE(doors.pre_hooks) != 0 ||
      PyDict_GetItemWithError(doors.compiler, doors.compiling) != Py_False)
    return nullptr;
  Ref dict(PyObject_GenericGetDict(module, nullptr));
  if (!dict) return nullptr;
  PyObject* table = PyDict_GetItemWithError(dict.get(), doors.table);
  if (table == nullptr || !Py_IS_TYPE(table, table_type) || holds(dict.get(), doors.own_hooks) ||
      holds(dict.get(), doors.own_pre_hooks))
    return nullptr;
  return Py_NewRef(table);
}

bool are_plain(size_t given, PyObject* names, Py_ssize_t least) {
  return PyVectorcall_NARGS(given) >= least && (names == nullptr || PyTuple_GET_SIZE(names) == 0);
}

PyObject* door_call(PyObject* function, PyObject* const* args, size_t given, PyObject* names) {
  HANDLE_TH_ERRORS
  Ref table(are_plain(given, names, 2) ? table_of(args[0]) : nullptr);
  if (!table) {
    PyErr_Clear();
    return doors.call(function, args, given, names);
  }
  Ref result;
  const auto outcome = answer(*reinterpret_cast<Table*>(table.get())->state, args + 1, PyVectorcall_NARGS(given) - 1,
                              nullptr, result);
  if (outcome == Outcome::left_alone) return doors.call(function, args, given, names);
  return outcome == Outcome::done ? result.release() : nullptr;
  END_HANDLE_TH_ERRORS
}

PyObject* door_into(PyObject* function, PyObject* const* args, size_t given, PyObject* names) {
  HANDLE_TH_ERRORS
  Ref table(are_plain(given, names, 3) ? table_of(args[0]) : nullptr);
  if (!table) {
    PyErr_Clear();
    return doors.into(function, args, given, names);
  }
  const auto outcome = answer_into(*reinterpret_cast<Table*>(table.get())->state, args[1], args + 2,
                                   PyVectorcall_NARGS(given) - 2);
  if (outcome == Outcome::left_alone)
    return PyObject_VectorcallMethod(doors.into_name, args, static_cast<size_t>(PyVectorcall_NARGS(given)), nullptr);
  return outcome == Outcome::done ? Py_NewRef(args[1]) : nullptr;
  END_HANDLE_TH_ERRORS
}

void set_door(PyObject* function, vectorcallfunc door, vectorcallfunc* before) {
  auto* made = reinterpret_cast<PyFunctionObject*>(function);
  if (made->vectorcall == door) return;
  *before = made->vectorcall;
#if PY_VERSION_HEX >= 0x030C0000
  // The interpreter has to look at it, where it would have gone into the function by itself.
  PyFunction_SetVectorcall(made, door);
#else
  made->vectorcall = door;
#endif
}

// (__call__, forward_into, global hooks, global pre-hooks, the dictionary of torch.compiler)
PyObject* module_open(PyObject*, PyObject* given) {
  PyObject *call, *into, *hooks, *pre_hooks, *compiler;
  if (!PyArg_ParseTuple(given, "O!O!O!O!O!:open", &PyFunction_Type, &call, &PyFunction_Type, &into, &PyDict_Type,
                        &hooks, &PyDict_Type, &pre_hooks, &PyDict_Type, &compiler))
    return nullptr;
  if (doors.table == nullptr) {
    PyObject** const places[] = {&doors.own_hooks, &doors.own_pre_hooks, &doors.compiling, &doors.into_name,
                                 &doors.table};
    const char* const texts[] = {"_forward_hooks", "_forward_pre_hooks", "_is_compiling_flag", "_into", "_table"};
    for (size_t i = 0; i < std::size(places); ++i)
      if ((*places[i] = PyUnicode_InternFromString(texts[i])) == nullptr) return nullptr;
  }
  Py_XSETREF(doors.hooks, Py_NewRef(hooks));
  Py_XSETREF(doors.pre_hooks, Py_NewRef(pre_hooks));
  Py_XSETREF(doors.compiler, Py_NewRef(compiler));
  set_door(call, door_call, &doors.call);
  set_door(into, door_into, &doors.into);
  Py_RETURN_NONE;
}

// ---- sessions

// A graph of a session's own on its static buffers: Session.run.
struct Run {
  PyObject_HEAD
  vectorcallfunc call;
  State* state;  // Of the table.
  uint64_t executable;
  int device;
  PyObject *table, *graph, *lane, *lock, *executables, *index, *otherwise;
};

std::array<PyObject**, 7> held_by(Run& run) {
  return {&run.table, &run.graph, &run.lane, &run.lock, &run.executables, &run.index, &run.otherwise};
}

Outcome run_once(Run& run) {
  State& state = *run.state;
  uint64_t stream = 0;
  if (const auto known = current_stream(state, run.index, run.device, &stream); known != Outcome::done) return known;
  if (stream == 0) return Outcome::left_alone;
  Held lock(*reinterpret_cast<Lock*>(run.lock));
  if (!lock) return Outcome::left_alone;
  if (state.executables.in(run.graph) != run.executables || state.stream.number(run.lane) != stream)
    return Outcome::left_alone;
  return launch(state, run.executable, stream);
}

PyObject* run_call(PyObject* self, PyObject* const*, size_t given, PyObject* names) {
  HANDLE_TH_ERRORS
  if (PyVectorcall_NARGS(given) != 0 || (names != nullptr && PyTuple_GET_SIZE(names) != 0))
    return PyErr_Format(PyExc_TypeError, "run() takes no arguments");
  Run& run = *reinterpret_cast<Run*>(self);
  const auto outcome = run.graph == nullptr ? Outcome::left_alone : run_once(run);
  if (outcome == Outcome::failed) return nullptr;
  if (outcome == Outcome::done) Py_RETURN_NONE;
  if (run.otherwise == nullptr) return PyErr_Format(PyExc_RuntimeError, "this session is gone");
  Ref otherwise(Py_NewRef(run.otherwise));
  return PyObject_CallNoArgs(otherwise.get());
  END_HANDLE_TH_ERRORS
}

int run_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  for (PyObject** each : held_by(*reinterpret_cast<Run*>(self))) Py_VISIT(*each);
  return 0;
}

int run_clear(PyObject* self) {
  for (PyObject** each : held_by(*reinterpret_cast<Run*>(self))) Py_CLEAR(*each);
  return 0;
}

void run_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  run_clear(self);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef run_members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Run, call), READONLY, nullptr},
                             {nullptr, 0, 0, 0, nullptr}};

PyType_Slot run_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(run_dealloc)},
                           {Py_tp_traverse, reinterpret_cast<void*>(run_traverse)},
                           {Py_tp_clear, reinterpret_cast<void*>(run_clear)},
                           {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                           {Py_tp_members, run_members},
                           {0, nullptr}};

PyType_Spec run_spec = {"_graphcache_hit.Run", sizeof(Run), 0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                            Py_TPFLAGS_DISALLOW_INSTANTIATION,
                        run_slots};

PyTypeObject* run_type;

// (graph, lane, lock, executables, index, executable, otherwise)
PyObject* table_run(Table* self, PyObject* given) {
  HANDLE_TH_ERRORS
  State& state = *self->state;
  PyObject *graph, *lane, *lock, *executables, *index, *otherwise;
  unsigned long long executable;
  if (!PyArg_ParseTuple(given, "OOOOOKO:run", &graph, &lane, &lock, &executables, &index, &executable, &otherwise))
    return nullptr;
  if (!state.executables.is_of(graph) || !state.stream.is_of(lane))
    return PyErr_Format(PyExc_TypeError, "expected a CudaGraph and a Lane");
  if (!Py_IS_TYPE(lock, lock_type)) return Py_NewRef(otherwise);
  auto* made = reinterpret_cast<Run*>(run_type->tp_alloc(run_type, 0));
  if (made == nullptr) return nullptr;
  made->call = run_call;
  made->state = &state;
  made->executable = executable;
  made->device = device_of(index);
  made->table = Py_NewRef(reinterpret_cast<PyObject*>(self));
  made->graph = Py_NewRef(graph);
  made->lane = Py_NewRef(lane);
  made->lock = Py_NewRef(lock);
  made->executables = Py_NewRef(executables);
  made->index = Py_NewRef(index);
  made->otherwise = Py_NewRef(otherwise);
  return reinterpret_cast<PyObject*>(made);
  END_HANDLE_TH_ERRORS
}

// ---- for the probe: the same questions, answered by themselves

PyObject* module_is_quiet(PyObject*, PyObject*) { return PyBool_FromLong(nothing_special()); }

PyObject* module_layout(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  c10::TensorImpl* tensors[most_inputs];
  Words words;
  if (!PyTuple_CheckExact(args) || !describe(args, tensors, words)) Py_RETURN_NONE;
  Ref made(PyTuple_New(static_cast<Py_ssize_t>(words.size())));
  if (!made) return nullptr;
  for (size_t i = 0; i < words.size(); ++i) {
    PyObject* word = PyLong_FromUnsignedLongLong(words[i]);
    if (word == nullptr) return nullptr;
    PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), word);
  }
  return made.release();
  END_HANDLE_TH_ERRORS
}

PyObject* module_address(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  c10::TensorImpl* tensor = plain(object);
  if (tensor == nullptr) Py_RETURN_NONE;
  return PyLong_FromUnsignedLongLong(address_of(tensor));
  END_HANDLE_TH_ERRORS
}

PyObject* module_empty_like(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  Maker maker;
  if (!make_as(object, maker)) Py_RETURN_NONE;
  return make(maker);
  END_HANDLE_TH_ERRORS
}

PyMethodDef module_methods[] = {
    {"open", module_open, METH_VARARGS, "Let calls of two Python functions come to the table of their module first."},
    {"is_quiet", module_is_quiet, METH_NOARGS, "No gradients, autocast, modes, transforms or tracing here."},
    {"layout", module_layout, METH_O, "What tells a tuple of plain tensors from others; None for anything else."},
    {"address", module_address, METH_O, "Where a plain tensor's data lies; None for anything else."},
    {"empty_like", module_empty_like, METH_O, "A new tensor like a plain one, from its allocator; None if it has none."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_graphcache_hit", nullptr, -1, module_methods};

}  // namespace

PyMODINIT_FUNC PyInit__graphcache_hit() {
  Ref module(PyModule_Create(&module_def));
  Ref type(PyType_FromSpec(&table_spec));
  Ref run(PyType_FromSpec(&run_spec)), lock(PyType_FromSpec(&lock_spec));
  if (!module || !type || !run || !lock || PyModule_AddObjectRef(module.get(), "Table", type.get()) < 0 ||
      PyModule_AddObjectRef(module.get(), "Lock", lock.get()) < 0)
    return nullptr;
  lock_type = reinterpret_cast<PyTypeObject*>(lock.release());
  table_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type.get()));
  run_type = reinterpret_cast<PyTypeObject*>(run.release());
  return module.release();
}
