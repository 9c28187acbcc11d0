// A CUDA runtime, and the libraries above it, that answer as a card of models.h would and compute nothing: memory is the host's, copies
// are made, kernels are not run. Each symbol that torch imports and this file lacks becomes a stub that returns 0 (see nullgpu.py).
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <errno.h>
#include <sys/mman.h>
#include "models.h"

// ---- device
static _Thread_local int device = 0;
cudaError_t cudaGetDeviceCount(int *n) { char *s = getenv("NULLGPU_DEVICES"); *n = s ? atoi(s) : 1; return 0; }
cudaError_t cudaGetDevice(int *d) { *d = device; return 0; }
cudaError_t cudaSetDevice(int d) { device = d; return 0; }
cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return 0; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return 0; }
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:%02x:00.0", d); return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "null GPU"; }
const char *cudaGetErrorName(cudaError_t e) { return "null GPU"; }
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  switch (a) {
    case cudaDevAttrComputeCapabilityMajor: *v = model(d)->major; break;
    case cudaDevAttrComputeCapabilityMinor: *v = model(d)->minor; break;
    case cudaDevAttrMultiProcessorCount: *v = model(d)->processors; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = model(d)->threads; break;
    case cudaDevAttrMaxRegistersPerBlock: *v = 65536; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = shared_of_block(d); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = model(d)->shared; break;
    case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *v = 65535; break;
    default: *v = 1;
  }
  return 0;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {  // CUDA 12's header renames it to _v2, as torch's library imports it
  const struct model *m = model(d);
  memset(p, 0, sizeof *p);
  strcpy(p->name, m->name);
  p->major = m->major; p->minor = m->minor; p->multiProcessorCount = m->processors; p->totalGlobalMem = memory(d);
  p->l2CacheSize = m->l2 << 20; p->warpSize = 32; p->regsPerMultiprocessor = p->regsPerBlock = 65536;
  p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = m->threads; p->maxBlocksPerMultiProcessor = m->blocks;
  p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = shared_of_block(d); p->sharedMemPerMultiprocessor = m->shared;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535; p->pciBusID = d; p->unifiedAddressing = 1;
  p->textureAlignment = 512;
  return 0;
}

// ---- memory: fresh pages are zero, and take no room until something writes to them. Each device and pinned host memory have 2 TiB of
// addresses of their own, so that an address tells what it is.
enum { PAGE = 4096, DEVICES = 16, PINNED = DEVICES, PAGEABLE };
static const size_t BASE = 1ull << 44, SPAN = 1ull << 41;
static size_t next[PINNED + 1];
static int place(const void *p) { size_t at = (size_t)p - BASE; return at < (PINNED + 1) * SPAN ? at / SPAN : PAGEABLE; }
static cudaError_t take(void **p, size_t bytes, int where) {
  size_t n = (bytes + 2 * PAGE - 1) / PAGE * PAGE, at;
  size_t *m;
  do {  // round and round: what lives is far less than the addresses
    at = __atomic_fetch_add(&next[where], n, __ATOMIC_RELAXED) % (SPAN - n) / PAGE * PAGE;
    m = mmap((char *)BASE + where * SPAN + at, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  } while (m == MAP_FAILED && errno == EEXIST);
  if (m == MAP_FAILED) return cudaErrorMemoryAllocation;
  m[0] = n; m[1] = bytes; *p = (char *)m + PAGE;
  return 0;
}
static cudaError_t give(void *p) { if (p) { size_t *m = (size_t *)((char *)p - PAGE); munmap(m, m[0]); } return 0; }

enum { ACTIVATION = 64 << 20 };  // larger than any weight: zeros that need no copy from a device to itself

// ---- counts: how often the host waited for a device, copied from pageable memory to it, and the bytes in use at most on a device
static long waits, pageable, used[DEVICES], peak[DEVICES];
static _Thread_local int arrived;  // this thread has just waited, inside a copy: torch then synchronizes the stream, which is no second wait
void nullgpu_counts(long out[3]) {
  out[0] = waits; out[1] = pageable; out[2] = 0;
  for (int d = 0; d < DEVICES; d++) if (peak[d] > out[2]) out[2] = peak[d];
}
void nullgpu_reset_peak(void) { memcpy(peak, used, sizeof peak); }
static void await(void) { __atomic_fetch_add(&waits, 1, __ATOMIC_RELAXED); }
static int use(int d, long bytes) {  // whether they fit
  long now = __atomic_add_fetch(&used[d], bytes, __ATOMIC_RELAXED);
  if (bytes > 0 && now > memory(d) - CONTEXT) { __atomic_sub_fetch(&used[d], bytes, __ATOMIC_RELAXED); return 0; }
  if (now > peak[d]) peak[d] = now;
  return 1;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { if (!arrived) await(); arrived = 0; return 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { await(); return 0; }
cudaError_t cudaDeviceSynchronize(void) { await(); return 0; }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **args, size_t n, cudaStream_t s) { arrived = 0; return 0; }
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) {
  int to = place(d), from = place(s);
  arrived = from < DEVICES && to == PAGEABLE;
  if (arrived) await();
  if (to < DEVICES && from == PAGEABLE) __atomic_fetch_add(&pageable, 1, __ATOMIC_RELAXED);
  if (to >= DEVICES || from >= DEVICES || n < ACTIVATION) memmove(d, s, n);
  return 0;
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) {
  cudaMemcpyAsync(d, s, n, k, 0);
  return cudaStreamSynchronize(0);
}
cudaError_t cudaMalloc(void **p, size_t n) {
  if (!use(device, n)) return cudaErrorMemoryAllocation;
  cudaError_t e = take(p, n, device);
  if (e) use(device, -(long)n);
  return e;
}
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
cudaError_t cudaFree(void *p) { if (p) use(place(p), -((long *)((char *)p - PAGE))[1]); return give(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { return take(p, n, PINNED); }
cudaError_t cudaFreeHost(void *p) { return give(p); }
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) { *t = memory(device); *f = *t - CONTEXT - used[device]; return 0; }
cudaError_t cudaMemset(void *d, int v, size_t n) { memset(d, v, n); return 0; }
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t s) { memset(d, v, n); return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  int where = place(p);
  memset(a, 0, sizeof *a);
  a->type = where < DEVICES ? cudaMemoryTypeDevice : where == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->device = where < DEVICES ? where : 0;
  a->devicePointer = where == PAGEABLE ? NULL : (void *)p;
  a->hostPointer = where == PINNED ? (void *)p : NULL;
  return 0;
}

// ---- streams, events, kernels
static void *name(void) { static long next = 0; return (void *)(next += 16); }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = name(); return 0; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { *s = name(); return 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = 0; return 0; }
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *i, cudaGraph_t *g,
                                        const cudaGraphNode_t **d, size_t *n) { *c = 0; return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = name(); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = name(); return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 0.01f; return 0; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->numRegs = 64;
  a->binaryVersion = a->ptxVersion = 10 * model(device)->major + model(device)->minor;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned g) { *n = 4; return 0; }
void *__cudaRegisterFatBinary(void *x) { static long h[64]; return h; }

// ---- libraries: handles that are not null, work spaces of 0 bytes, no work
static int handle(void **h) { *h = malloc(64); return 0; }
int cublasCreate_v2(void **h) { return handle(h); }
int cublasLtCreate(void **h) { return handle(h); }
int cublasLtMatmulDescCreate(void **h, int a, int b) { return handle(h); }
int cublasLtMatrixLayoutCreate(void **h, int t, unsigned long r, unsigned long c, long l) { return handle(h); }
int cublasLtMatmulPreferenceCreate(void **h) { return handle(h); }
int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int want, void *result, int *n) {
  memset(result, 0, 128); *n = 1; return 0;
}
int cusolverDnCreate(void **h) { return handle(h); }
int cusolverDnCreateParams(void **h) { return handle(h); }
int cusolverDnXpotrf_bufferSize(void *h, void *p, int u, long n, int t, void *a, long lda, int c, size_t *dev, size_t *host) { *dev = *host = 0; return 0; }
int cusolverDnDpotrf_bufferSize(void *h, int u, int n, void *a, int lda, int *size) { *size = 0; return 0; }
int cusolverDnSpotrf_bufferSize(void *h, int u, int n, void *a, int lda, int *size) { *size = 0; return 0; }
int cusparseCreate(void **h) { return handle(h); }
int cudnnCreate(void **h) { return handle(h); }
unsigned long cudnnGetVersion(void) { return 91002; }
const char *cudnnGetErrorString(int e) { return "null GPU"; }
const char *ncclGetErrorString(int e) { return "null GPU"; }
const char *ncclGetLastError(void *c) { return "null GPU"; }
int ncclGetVersion(int *v) { *v = 22705; return 0; }
struct id { char bytes[128]; };
int ncclCommInitRank(void **c, int n, struct id i, int r) { return handle(c); }
int ncclCommInitRankConfig(void **c, int n, struct id i, int r, void *cfg) { return handle(c); }
int ncclCommGetAsyncError(void *c, int *e) { *e = 0; return 0; }
