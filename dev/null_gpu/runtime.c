/* The CUDA runtime and cuBLAS, as PyTorch calls them, of a GPU that computes nothing. Memory is handed out, without backing
   until it is touched; copies of up to COPIED bytes happen; kernels and matrix products do not. Everything that runs on the
   host is the real thing: PyTorch's allocator, its checks of devices, types and shapes, transformers' Trainer. build.py adds a
   function that only reports success for each that is not here. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define COPIED (8ul << 20) /* bytes; larger copies are left out */
static const size_t page = 1 << 21;
#define MOST 65536
static struct { char *start; size_t size; int host; } ranges[MOST];
static int num_ranges;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t total(void) {
    const char *gib = getenv("NULL_GPU_GIB");
    return (size_t)(gib ? atol(gib) : 141) << 30;
}
static cudaError_t hand_out(void **out, size_t size, int host) {
    size_t rounded = (size + page - 1) / page * page;
    pthread_mutex_lock(&lock);
    cudaError_t result = cudaErrorMemoryAllocation;
    if (size == 0) {
        *out = NULL;
        result = cudaSuccess;
    } else if (host || used + rounded <= total()) {
        char *start = mmap(NULL, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        int i = 0;
        while (i < num_ranges && ranges[i].start) i++;
        if (start != MAP_FAILED && i < MOST) {
            if (i == num_ranges) num_ranges++;
            ranges[i].start = start, ranges[i].size = rounded, ranges[i].host = host;
            if (!host) used += rounded;
            *out = start;
            result = cudaSuccess;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}
static cudaError_t take_back(void *pointer) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_ranges; i++)
        if (pointer && ranges[i].start == pointer) {
            munmap(pointer, ranges[i].size);
            if (!ranges[i].host) used -= ranges[i].size;
            ranges[i].start = NULL;
        }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
static int kind_of(const void *pointer) { /* 0 unknown, 1 host, 2 device */
    int kind = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_ranges && !kind; i++)
        if (ranges[i].start && (char *)pointer >= ranges[i].start && (char *)pointer < ranges[i].start + ranges[i].size)
            kind = ranges[i].host ? 1 : 2;
    pthread_mutex_unlock(&lock);
    return kind;
}
static void *handle(void) { return calloc(1, 4096); }

cudaError_t cudaMalloc(void **p, size_t n) { return hand_out(p, n, 0); }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return hand_out(p, n, 0); }
cudaError_t cudaFree(void *p) { return take_back(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return take_back(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { return hand_out(p, n, 1); }
cudaError_t cudaFreeHost(void *p) { return take_back(p); }
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) { *t = total(); *f = *t - used; return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t st) {
    if (n <= COPIED) memmove(d, s, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) { return cudaMemcpyAsync(d, s, n, k, 0); }
cudaError_t cudaMemset(void *d, int v, size_t n) { if (n <= COPIED) memset(d, v, n); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t s) { return cudaMemset(d, v, n); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    int kind = kind_of(p);
    memset(a, 0, sizeof *a);
    a->type = kind == 2 ? cudaMemoryTypeDevice : kind == 1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->devicePointer = kind ? (void *)p : NULL;
    a->hostPointer = kind == 1 ? (void *)p : NULL;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *d) { *d = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int d) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "null GPU (computes nothing)");
    p->totalGlobalMem = total();
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = 65536, p->regsPerMultiprocessor = 65536;
    p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = 9, p->minor = 0, p->multiProcessorCount = 132, p->l2CacheSize = 50 << 20;
    p->textureAlignment = 512, p->unifiedAddressing = 1, p->managedMemory = 1, p->maxBlocksPerMultiProcessor = 32;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
    switch (a) {
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = 233472; break;
    case cudaDevAttrMultiProcessorCount: *v = 132; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrComputeCapabilityMajor: *v = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *v = 0; break;
    case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
    case cudaDevAttrMaxGridDimY: *v = 65535; break;
    default: *v = 1;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *l, int *g) { *l = 0; *g = -5; return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { *s = handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { *s = handle(); return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = handle(); return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id, cudaGraph_t *g,
    const cudaGraphNode_t **deps, const cudaGraphEdgeData **edges, size_t *n) {
    *c = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (n) *n = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = handle(); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = handle(); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1.0f; return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned fl) { *n = 2; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *c, int a, int b) { *c = 0; return cudaSuccess; }
const char *cudaGetErrorName(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError"; }
const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "error"; }
cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) { *k = (cudaKernel_t)f; return cudaSuccess; }
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *n, void **f, unsigned v, unsigned long long fl, enum cudaDriverEntryPointQueryResult *r) {
    *f = (void *)nothing;
    if (r) *r = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **p, const void *s) { static char symbols[1 << 20]; *p = symbols; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:00:00.0"); return cudaSuccess; }

/* Handles are opaque and results are statuses, so that cuBLAS's headers are not needed. */
int cublasCreate_v2(void **h) { *h = handle(); return 0; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { *d = handle(); return 0; }
int cublasLtMatmulPreferenceCreate(void **p) { *p = handle(); return 0; }
int cublasLtMatrixLayoutCreate(void **l, int type, uint64_t rows, uint64_t columns, int64_t lead) { *l = handle(); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *o, void *a, void *b, void *c, void *d, void *p, int asked, void *results, int *found) {
    memset(results, 0, 96); /* sizeof(cublasLtMatmulHeuristicResult_t) */
    *found = 1;
    return 0;
}
