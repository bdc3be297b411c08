// Which executable is launched, and where it points: as executables.py does it.
#pragma once

#include "state.h"

#include <algorithm>

namespace {

constexpr uint64_t looks_every = 16;

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
  c10::SmallVector<void*, 16> told;
  for (size_t i = 0; i < record.places.size(); ++i) {
    if (!changed[i]) continue;
    for (const Pointer& pointer : record.places[i].pointers) {
      if (std::find(told.begin(), told.end(), pointer.node) != told.end()) continue;
      const int code = pointer.kernel ? state.set_kernel(executable, pointer.node, pointer.params)
                                      : state.set_copy(executable, pointer.node, pointer.params, pointer.context);
      if (code != 0)
        return raise_failure(
            state, pointer.kernel ? "cuGraphExecKernelNodeSetParams" : "cuGraphExecMemcpyNodeSetParams", code);
      told.push_back(pointer.node);
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

}  // namespace
