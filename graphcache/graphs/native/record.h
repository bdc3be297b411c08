// What is known of a graph: where its tensors' addresses stand, how its outputs are made, whose it is.
#pragma once

#include "lock.h"
#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>

#include <utility>
#include <vector>

namespace {

// A place in the graph where an address stands, as param_patching.py found it.
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
  uint64_t context;  // Of its device.
  PyObject *engine, *epoch, *is_stale, *build;  // Null where there is none.
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

// A device's index, or -1 for what is none.
int device_of(PyObject* index) {
  const long found = PyLong_CheckExact(index) ? PyLong_AsLong(index) : -1;
  if (found == -1) PyErr_Clear();
  return found >= 0 && found < 128 ? static_cast<int>(found) : -1;
}

}  // namespace
