/* The driver's part, for what asks it directly: PyTorch for a context, Triton to load and start kernels. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { if (flags) *flags = 0; *active = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "error"; return 0; }
int cuPointerGetAttribute(void *data, int attribute, unsigned long long p) { *(unsigned long long *)data = p; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 1 ? 1024 : attribute == 8 ? 49152 : attribute == 10 ? 32 : attribute == 16 ? 132 : attribute == 39 ? 2048
        : attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 81 ? 233472 : attribute == 82 || attribute == 12 ? 65536 : attribute == 97 ? 232448 : 1;
    return 0;
}
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
