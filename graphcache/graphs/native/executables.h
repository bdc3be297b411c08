// Which executable of a graph is launched, and where it points.
//
// A patch delays the next launch by 0.7 µs (H200) to 3.5 µs (H100), a change of executables by 0.3 µs with 3 nodes. So a
// small graph that is called again and again has several executables, each pointed at the tensors of an earlier call: a
// loop goes through three or four pairs of addresses of torch's allocator, a ring of buffers through more.
#pragma once

#include "graph.h"
#include "lock.h"

#include <algorithm>

namespace {

// Graph::alone at which there is one more. With 32 graphs of 3 nodes in turn, eight executables each took 4.5 µs longer
// than the bare launch and one each 1.1; with one graph it was 0.7 and 1.5 (H200).
constexpr uint64_t grows_after = 32;

// Where addresses do not come again, they are looked for once in so many launches.
constexpr uint64_t looks_every = 16;

// Graph::streak from which on addresses do not come again.
uint64_t patience(const Graph& graph) { return 4 * (graph.most - 1); }

size_t differences(const Graph& graph, size_t index, const uint64_t* wanted) {
  const uint64_t* found = graph.executables[index].addresses;
  size_t count = 0;
  for (size_t i = 0; i < graph.places.size(); ++i) count += found[i] != wanted[i];
  return count;
}

// Point an executable elsewhere. The driver takes a node's parameters as a whole, and several tensors may stand in one:
// all words are written before any node is set. What the driver refuses, and what comes after that, is unknown then.
Outcome point(Graph& graph, size_t index, const uint64_t* wanted) {
  Driver& driver = *graph.driver;
  const Executable& executable = graph.executables[index];
  uint64_t* found = executable.addresses;
  bool changed[most_places];
  for (size_t i = 0; i < graph.places.size(); ++i) {
    for (const Pointer& pointer : graph.places[i].pointers) *pointer.word = wanted[i] + pointer.offset;
    if ((changed[i] = found[i] != wanted[i])) found[i] = unknown;
  }
  c10::SmallVector<void*, 16> told;
  for (size_t i = 0; i < graph.places.size(); ++i) {
    if (!changed[i]) continue;
    for (const Pointer& pointer : graph.places[i].pointers) {
      if (std::find(told.begin(), told.end(), pointer.node) != told.end()) continue;
      const int code = pointer.kernel
          ? driver.set_kernel(executable.handle, pointer.node, pointer.params)
          : driver.set_copy(executable.handle, pointer.node, pointer.params, pointer.context);
      if (code != 0)
        return driver.raise(pointer.kernel ? "cuGraphExecKernelNodeSetParams" : "cuGraphExecMemcpyNodeSetParams", code);
      told.push_back(pointer.node);
    }
    found[i] = wanted[i];
  }
  graph.hand = (index + 1) % graph.executables.size();
  return Outcome::done;
}

// One more executable, pointed nowhere; false where the device has no memory for it, and then it is not asked again.
bool add(Graph& graph) {
  InstantiateParams params{};
  void* handle = nullptr;
  const size_t count = graph.executables.size();
  if (graph.driver->instantiate(&handle, graph.captured, &params) != 0) {
    graph.most = count;
    return false;
  }
  uint64_t* addresses = graph.addresses.get() + (count - 1) * graph.places.size();
  std::fill_n(addresses, graph.places.size(), unknown);
  graph.executables.push_back({handle, addresses});
  return true;
}

// One was pointed elsewhere, in a graph that was launched before this launch too, or that takes turns with others.
void count_patch(Graph& graph, bool again) {
  if (again)
    ++graph.alone;
  else if (graph.alone != 0)
    --graph.alone;
}

// The executable that differs in the fewest addresses; of several, the first one from the hand on.
size_t nearest(const Graph& graph, const uint64_t* wanted) {
  size_t least = ~size_t{0}, found = 0;
  for (size_t step = 0; step < graph.executables.size(); ++step) {
    const size_t each = (graph.hand + step) % graph.executables.size();
    if (const size_t differs = differences(graph, each, wanted); differs < least) least = differs, found = each;
  }
  return found;
}

// Expect, for the next launch, the executable that is pointed where it is wanted, or is now.
Outcome aim(Graph& graph, const Lock& lock, const uint64_t* wanted) {
  size_t index = graph.expected;
  if (differences(graph, index, wanted) == 0) {
    graph.streak = 0;
    return Outcome::done;
  }
  const bool searches = graph.streak < patience(graph), full = graph.executables.size() == graph.most;
  bool found = false;
  if (searches || !full || graph.streak % looks_every == 0)
    for (size_t each = 0; each < graph.executables.size() && !found; ++each)
      if (differences(graph, each, wanted) == 0) found = true, index = each;
  if (found) {
    graph.streak = 0;
  } else {
    if (searches) index = nearest(graph, wanted);
    if (!full && graph.alone >= grows_after && add(graph)) index = graph.executables.size() - 1;
    if (const auto pointed = point(graph, index, wanted); pointed != Outcome::done) return pointed;
    ++graph.streak;
    count_patch(graph, lock.launched_last == &graph);
  }
  if (index != graph.expected) {
    graph.executables[graph.last].next = index;
    graph.expected = index;
  }
  return Outcome::done;
}

// The expected executable was launched: expect the one that came after it the last time. Where addresses do not come
// again, or as long as there is but one, it is pointed at the next outputs (null if they are not known) now, while the
// device works.
Outcome launched(Graph& graph, Lock& lock, const uint64_t* outputs) {
  const bool again = lock.launched_last == &graph;
  lock.launched_last = &graph;
  graph.last = graph.expected;
  const size_t following = graph.executables[graph.last].next;
  graph.expected = following;
  if (outputs == nullptr) return Outcome::done;
  uint64_t wanted[most_places];
  std::copy_n(graph.executables[following].addresses, graph.inputs, wanted);
  std::copy_n(outputs, graph.outputs(), wanted + graph.inputs);
  if (differences(graph, following, wanted) == 0) return Outcome::done;
  const size_t count = graph.executables.size();
  if (count == graph.most ? graph.streak >= patience(graph) : count == 1 && graph.alone < grows_after) {
    const size_t index = graph.hand;
    std::copy_n(graph.executables[index].addresses, graph.inputs, wanted);
    if (const auto pointed = point(graph, index, wanted); pointed != Outcome::done) return pointed;
    count_patch(graph, again);
    graph.expected = index;
    return Outcome::done;
  }
  for (size_t each = 0; each < count; ++each)
    if (differences(graph, each, wanted) == 0) {
      graph.expected = each;
      break;
    }
  return Outcome::done;
}

}  // namespace
