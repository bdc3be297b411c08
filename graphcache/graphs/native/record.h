// What is known of calls of one layout: which graph answers them, and when it may.
#pragma once

#include "graph.h"
#include "lock.h"

#include <utility>
#include <vector>

namespace {

struct Record {
  Words words;
  size_t users = 0;  // Guarded by the GIL, as everything here.
  std::vector<Ref> held;  // Everything borrowed below.
  Lock* lock;
  PyObject *entry, *graph, *order, *index;
  Graph* native;
  int device;
  uint64_t context;  // Of its device.
  PyObject *engine, *epoch, *is_stale, *build;  // Null where there is none.

  PyObject* hold(PyObject* object) {
    held.emplace_back(Py_NewRef(object));
    return object;
  }

  PyObject* hold_unless_none(PyObject* object) { return object == Py_None ? nullptr : hold(object); }
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

// A device's index, or -1 for what is none.
int device_of(PyObject* index) {
  const long found = PyLong_CheckExact(index) ? PyLong_AsLong(index) : -1;
  if (found == -1) PyErr_Clear();
  return found >= 0 && found < 128 ? static_cast<int>(found) : -1;
}

}  // namespace
