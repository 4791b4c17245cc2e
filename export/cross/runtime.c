/* Stubs of the CUDA runtime functions that PyTorch calls, for an absent device; preloaded to precede libcudart.
 *
 * Memory is allocated, copied and filled on the host; kernels are not run. Functions that are missing here resolve to
 * libcudart's own, which fail on the stubbed driver: so does cudaEventElapsedTime, which measuring kernels would need.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <string.h>
#include <sys/mman.h>

#include "device.h"

#define SOME(kind) ((kind)1)
#define HEADER 4096

cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, DEVICE_NAME);
    properties->major = DEVICE_CAPABILITY / 10;
    properties->minor = DEVICE_CAPABILITY % 10;
    properties->totalGlobalMem = (size_t)DEVICE_GIGABYTES << 30;
    properties->multiProcessorCount = DEVICE_MULTIPROCESSORS;
    properties->warpSize = DEVICE_WARP;
    properties->maxThreadsPerBlock = DEVICE_THREADS_PER_BLOCK;
    properties->maxThreadsPerMultiProcessor = DEVICE_THREADS_PER_MULTIPROCESSOR;
    properties->regsPerBlock = properties->regsPerMultiprocessor = DEVICE_REGISTERS;
    properties->sharedMemPerBlock = DEVICE_SHARED_BYTES;
    properties->sharedMemPerBlockOptin = DEVICE_SHARED_BYTES_OPTIN;
    properties->sharedMemPerMultiprocessor = DEVICE_SHARED_BYTES_OPTIN + 1024;
    properties->l2CacheSize = DEVICE_L2_MEGABYTES << 20;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = 0;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = *total = (size_t)DEVICE_GIGABYTES << 30;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **memory, size_t size) {
    /* Pages that are never written take no memory. */
    char *start = mmap(NULL, size + HEADER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
    *(size_t *)start = size + HEADER;
    *memory = start + HEADER;
    return cudaSuccess;
}
cudaError_t cudaFree(void *memory) {
    if (memory != NULL) munmap((char *)memory - HEADER, *(size_t *)((char *)memory - HEADER));
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) { return cudaMalloc(memory, size); }
cudaError_t cudaFreeHost(void *memory) { return cudaFree(memory); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    /* PyTorch asks only whether host memory is page-locked. */
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream) {
    memset(memory, value, size);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = SOME(cudaStream_t);
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
#endif
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = SOME(cudaEvent_t);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = DEVICE_THREADS_PER_BLOCK;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *function, int threads, size_t shared, unsigned flags) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(
    const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel() { return cudaSuccess; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL), name);
    if (result != NULL) *result = *function == NULL ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
