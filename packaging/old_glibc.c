// What GNU's C++ library takes from a C library newer than 2.28, for the wheels that run on such an old one.
#include <stdlib.h>
#include <unistd.h>

// Since 2.32: whether the process has one thread, so that shared counts need not be atomic. They always are.
char __libc_single_threaded = 0;

// Since 2.36, for std::random_device.
unsigned arc4random(void) {
  unsigned number;
  if (getentropy(&number, sizeof number)) abort();
  return number;
}
