// Which executable of a graph is launched, and where it points.
//
// A patch delays the next launch by 0.7 µs (H200) to 3.5 µs (H100), a change of executables by 0.3 µs with 3 nodes. So a
// small graph that is called again and again has several executables, each pointed at the tensors of an earlier call: a
// loop goes through three or four pairs of addresses of torch's allocator, a ring of buffers through more.
#pragma once

#include "graph.h"

// Graph.alone at which there is one more. With 32 graphs of 3 nodes in turn, eight executables each took 4.5 µs longer
// than the bare launch and one each 1.1; with one graph it was 0.7 and 1.5 (H200).
#define GROWS_AFTER 32

// Where addresses do not come again, they are looked for once in so many launches.
#define LOOKS_EVERY 16

// Graph.streak from which on addresses do not come again.
static uint64_t patience(const Graph *graph) { return 4 * (graph->most - 1); }

static size_t differences(const Graph *graph, size_t index, const uint64_t *wanted) {
  const uint64_t *found = graph->executables[index].addresses;
  size_t count = 0;
  for (size_t i = 0; i < graph->all; ++i) count += found[i] != wanted[i];
  return count;
}

// The executable that points where it is wanted; Graph.count if there is none.
static size_t pointed_at(const Graph *graph, const uint64_t *wanted) {
  size_t index = 0;
  while (index < graph->count && differences(graph, index, wanted) != 0) ++index;
  return index;
}

// Whether a node was set for the sake of a place or pointer before this one.
static int is_set(const Graph *graph, const int *changed, size_t place, Py_ssize_t at) {
  for (size_t i = 0; i <= place; ++i)
    for (Py_ssize_t j = 0; changed[i] && j < (i < place ? graph->places[i].count : at); ++j)
      if (graph->places[i].pointers[j].node == graph->places[place].pointers[at].node) return 1;
  return 0;
}

// Point an executable elsewhere. The driver takes a node's parameters as a whole, and several tensors may stand in one:
// all words are written before any node is set. What the driver refuses, and what comes after that, is unknown then.
static Outcome point(Graph *graph, size_t index, const uint64_t *wanted) {
  void *executable = graph->executables[index].handle;
  uint64_t *found = graph->executables[index].addresses;
  int changed[MOST_PLACES];
  for (size_t i = 0; i < graph->all; ++i) {
    const Place *place = graph->places + i;
    for (Py_ssize_t j = 0; j < place->count; ++j) *place->pointers[j].word = wanted[i] + (uint64_t)place->pointers[j].offset;
    if ((changed[i] = found[i] != wanted[i])) found[i] = UNKNOWN;
  }
  for (size_t i = 0; i < graph->all; ++i) {
    for (Py_ssize_t j = 0; changed[i] && j < graph->places[i].count; ++j) {
      const Pointer *pointer = graph->places[i].pointers + j;
      if (is_set(graph, changed, i, j)) continue;
      const int code = pointer->kernel ? driver.set_kernel(executable, pointer->node, pointer->params)
                                       : driver.set_copy(executable, pointer->node, pointer->params, pointer->context);
      if (code != 0)
        return refused(pointer->kernel ? "cuGraphExecKernelNodeSetParams" : "cuGraphExecMemcpyNodeSetParams", code);
    }
    if (changed[i]) found[i] = wanted[i];
  }
  graph->hand = (index + 1) % graph->count;
  return DONE;
}

// One more executable, pointed nowhere; false where the device has no memory for it, and then it is not asked again.
static int add_executable(Graph *graph) {
  InstantiateParams params = {0};
  void *handle = NULL;
  if (driver.instantiate(&handle, graph->captured, &params) != 0) {
    graph->most = graph->count;
    return 0;
  }
  uint64_t *addresses = graph->addresses + graph->count * graph->all;
  for (size_t i = 0; i < graph->all; ++i) addresses[i] = UNKNOWN;
  graph->executables[graph->count++] = (Executable){.handle = handle, .addresses = addresses};
  return 1;
}

// One was pointed elsewhere, in a graph that was launched before this launch too, or that takes turns with others.
static void count_patch(Graph *graph, int again) {
  if (again) ++graph->alone;
  else if (graph->alone != 0) --graph->alone;
}

// The executable that differs in the fewest addresses; of several, the first one from the hand on.
static size_t nearest(const Graph *graph, const uint64_t *wanted) {
  size_t least = SIZE_MAX, found = 0;
  for (size_t step = 0; step < graph->count; ++step) {
    const size_t each = (graph->hand + step) % graph->count, differs = differences(graph, each, wanted);
    if (differs < least) least = differs, found = each;
  }
  return found;
}

// Expect, for the next launch, the executable that is pointed where it is wanted, or is now.
static Outcome aim(Graph *graph, const Lock *lock, const uint64_t *wanted) {
  size_t index = graph->expected;
  if (differences(graph, index, wanted) == 0) {
    graph->streak = 0;
    return DONE;
  }
  const int searches = graph->streak < patience(graph), full = graph->count == graph->most;
  size_t found = graph->count;
  if (searches || !full || graph->streak % LOOKS_EVERY == 0) found = pointed_at(graph, wanted);
  if (found < graph->count) {
    index = found;
    graph->streak = 0;
  } else {
    if (searches) index = nearest(graph, wanted);
    if (!full && graph->alone >= GROWS_AFTER && add_executable(graph)) index = graph->count - 1;
    const Outcome pointed = point(graph, index, wanted);
    if (pointed != DONE) return pointed;
    ++graph->streak;
    count_patch(graph, lock->launched_last == graph);
  }
  if (index != graph->expected) {
    graph->executables[graph->last].next = index;
    graph->expected = index;
  }
  return DONE;
}

// The expected executable was launched: expect the one that came after it the last time. Where addresses do not come
// again, or as long as there is but one, it is pointed at the next outputs (NULL if they are not known) now, while the
// device works.
static Outcome launched(Graph *graph, Lock *lock, const uint64_t *outputs) {
  const int again = lock->launched_last == graph;
  lock->launched_last = graph;
  graph->last = graph->expected;
  const size_t following = graph->executables[graph->last].next;
  graph->expected = following;
  if (outputs == NULL) return DONE;
  uint64_t wanted[MOST_PLACES];
  memcpy(wanted, graph->executables[following].addresses, graph->inputs * sizeof *wanted);
  memcpy(wanted + graph->inputs, outputs, graph->outputs * sizeof *wanted);
  if (differences(graph, following, wanted) == 0) return DONE;
  if (graph->count == graph->most ? graph->streak >= patience(graph)
                                  : graph->count == 1 && graph->alone < GROWS_AFTER) {
    const size_t index = graph->hand;
    memcpy(wanted, graph->executables[index].addresses, graph->inputs * sizeof *wanted);
    const Outcome pointed = point(graph, index, wanted);
    if (pointed != DONE) return pointed;
    count_patch(graph, again);
    graph->expected = index;
    return DONE;
  }
  const size_t found = pointed_at(graph, wanted);
  if (found < graph->count) graph->expected = found;
  return DONE;
}
