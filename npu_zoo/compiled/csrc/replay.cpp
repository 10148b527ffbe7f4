// Calls one after the other, without going back to whoever wrote them down.
#include "replay.h"

extern "C" {

// program: for each of `count` calls the address of a function that takes words, and that of its words.
void zoo_replay(const int64_t* program, int64_t count) {
  using Call = void (*)(const int64_t*);
  for (int64_t i = 0; i < count; ++i)
    reinterpret_cast<Call>(program[2 * i])(reinterpret_cast<const int64_t*>(program[2 * i + 1]));
}
}
