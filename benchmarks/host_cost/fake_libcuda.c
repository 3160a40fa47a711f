// A CUDA driver that does nothing, for Triton's launchers to run over on a machine without a GPU. Every call succeeds.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define DONE(name) \
  int name(void) { \
    return 0; \
  }

DONE(cuInit)
DONE(cuCtxSetCurrent)
DONE(cuCtxSetLimit)
DONE(cuModuleUnload)
DONE(cuFuncSetAttribute)
DONE(cuFuncSetCacheConfig)
DONE(cuTensorMapEncodeTiled)
DONE(cuTensorMapEncodeIm2col)

static long launched = 0;

long launches(void) {
  return launched;
}

int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) {
  ++launched;
  return 0;
}

static int text(const char** to) {
  *to = "the fake driver";
  return 0;
}

static int handle(void** to, uintptr_t value) {
  *to = (void*)value;
  return 0;
}

static int number(int* to, int value) {
  *to = value;
  return 0;
}

int cuGetErrorString(int error, const char** to) {
  return text(to);
}

int cuGetErrorName(int error, const char** to) {
  return text(to);
}

int cuPointerGetAttribute(void* to, int attribute, uint64_t pointer) {  // any address is one of the device
  memcpy(to, &pointer, sizeof pointer);
  return 0;
}

int cuCtxGetCurrent(void** to) {
  return handle(to, 1);
}

int cuDevicePrimaryCtxRetain(void** to, int device) {
  return handle(to, 1);
}

int cuModuleLoadData(void** to, const void* image) {
  return handle(to, 2);
}

int cuModuleGetFunction(void** to, void* module, const char* name) {
  return handle(to, 3);
}

int cuCtxGetDevice(int* to) {
  return number(to, 0);
}

int cuDeviceGet(int* to, int ordinal) {
  return number(to, 0);
}

int cuDeviceGetCount(int* to) {
  return number(to, 1);
}

int cuDriverGetVersion(int* to) {
  return number(to, 13000);
}

int cuStreamIsCapturing(void* stream, int* to) {
  return number(to, 0);
}

int cuOccupancyMaxActiveClusters(int* to, void* function, const void* config) {
  return number(to, 1);
}

int cuFuncGetAttribute(int* to, int attribute, void* function) {
  return number(to, attribute == 0 ? 1024 : 0);  // 0: threads in a block, at most
}

int cuDeviceGetAttribute(int* to, int attribute, int device) {  // those of an H100 that launchers ask for
  enum { kMultiprocessors = 16, kMajor = 75, kMinor = 76, kSharedMemory = 232448 };
  return number(to, attribute == kMultiprocessors ? 132 : attribute == kMajor ? 9 : attribute == kMinor ? 0 : kSharedMemory);
}

int cuCtxGetLimit(size_t* to, int limit) {
  *to = 0;
  return 0;
}
