/* The device that the stubs report. The compiler's command line defines every DEVICE_... that has no value here. */
#define DEVICE_WARP 32
#define DEVICE_THREADS_PER_BLOCK 1024
#define DEVICE_REGISTERS 65536
#define DEVICE_SHARED_BYTES 49152
