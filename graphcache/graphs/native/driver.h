// The functions of the CUDA driver that are called here, at addresses that Python asked the driver for.
#pragma once

#include "objects.h"

#include <memory>

namespace {

enum class Outcome { done, left_alone, failed };

// CUDA_GRAPH_INSTANTIATE_PARAMS.
struct InstantiateParams {
  uint64_t flags;
  void* upload_stream;
  void* failed_node;
  int result;
};

// As the C interface of CUDA 12 declares them; a CUresult is an int.
struct Driver {
  int (*launch)(void* executable, void* stream);
  int (*set_kernel)(void* executable, void* node, const void* params);
  int (*set_copy)(void* executable, void* node, const void* params, void* context);
  int (*is_capturing)(void* stream, int* status);
  int (*current_context)(void** context);
  int (*instantiate)(void** executable, void* graph, InstantiateParams* params);
  int (*destroy)(void* executable);
  Ref failure;  // Makes the exception for the name of a function and its code.

  Driver(const unsigned long long* addresses, PyObject* makes_exception) : failure(Py_NewRef(makes_exception)) {
    set(launch, addresses[0]);
    set(set_kernel, addresses[1]);
    set(set_copy, addresses[2]);
    set(is_capturing, addresses[3]);
    set(current_context, addresses[4]);
    set(instantiate, addresses[5]);
    set(destroy, addresses[6]);
  }

  Outcome raise(const char* name, int code) {
    Ref error(PyObject_CallFunction(failure.get(), "si", name, code));
    if (error) PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.get())), error.get());
    return Outcome::failed;
  }

 private:
  template <class Function>
  static void set(Function& function, unsigned long long address) {
    function = reinterpret_cast<Function>(address);
  }
};

Outcome launch(Driver& driver, void* executable, uint64_t stream) {
  int code;
  Py_BEGIN_ALLOW_THREADS
  code = driver.launch(executable, reinterpret_cast<void*>(stream));
  Py_END_ALLOW_THREADS
  return code == 0 ? Outcome::done : driver.raise("cuGraphLaunch", code);
}

}  // namespace
