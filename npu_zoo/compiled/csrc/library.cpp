// What the library is and can do here.
#include <unistd.h>

#include "panels.h"

#if defined(ZOO_TILES)
#include <sys/syscall.h>
#endif

extern "C" {

// Asks the system for the matrix unit where the library uses it; 0 where this process may run the library.
int zoo_start() {
#if defined(ZOO_TILES)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return static_cast<int>(syscall(SYS_arch_prctl, kRequestPermission, kTileData));
#else
  return 0;
#endif
}

// The instructions that products use: 0 plain vectors, 1 bfloat16 dot products, 2 matrix tiles.
int zoo_instructions() {
#if defined(ZOO_TILES)
  return 2;
#elif defined(ZOO_BF16_DOT)
  return 1;
#else
  return 0;
#endif
}
}
