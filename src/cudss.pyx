# distutils: language = c++
"""cuDSS (NVIDIA, 1.x), found when it is asked for: nothing of it or of CUDA is needed to build or to import this.

Thin objects over its C interface: `Library`, `Handle`, `Config`, `Matrix`, `Data`. Addresses are those of device memory;
what lies there must outlive the work that uses it. Names and numbers are cuDSS's own (docs.nvidia.com/cuda/cudss).

A handle serves one call at a time: it has a lock, which is only ever waited for without the GIL, because cuDSS calls
back for memory under that lock, and the callback needs the GIL. In there Python may free `Data` of the same handle:
these are destroyed when the lock is free.
"""
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.string cimport memset, strncpy
from libcpp.vector cimport vector

cimport cython

import os
from threading import get_ident

cdef extern from "dlfcn.h" nogil:
    int RTLD_NOW, RTLD_LOCAL
    void* dlopen(const char*, int)
    void* dlsym(void*, const char*)
    char* dlerror()

cdef extern from "<pthread.h>" nogil:  # may be tried by the thread that has it, unlike std::mutex
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_trylock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)
    int pthread_mutex_destroy(pthread_mutex_t*)

ctypedef void* Object  # cudssHandle_t, cudssConfig_t, cudssData_t, cudssMatrix_t, cudaStream_t

cdef struct MemoryHandler:  # cudssDeviceMemHandler_t
    void* context
    int (*allocate)(void* context, void** pointer, size_t size, Object stream) noexcept nogil
    int (*release)(void* context, void* pointer, size_t size, Object stream) noexcept nogil
    char name[64]

cdef struct Functions:
    int (*cudssGetProperty)(int, int*) noexcept nogil
    int (*cudssCreate)(Object*) noexcept nogil
    int (*cudssDestroy)(Object) noexcept nogil
    int (*cudssSetStream)(Object, Object) noexcept nogil
    int (*cudssSetDeviceMemHandler)(Object, const MemoryHandler*) noexcept nogil
    int (*cudssConfigCreate)(Object*) noexcept nogil
    int (*cudssConfigDestroy)(Object) noexcept nogil
    int (*cudssConfigSet)(Object, int, const void*, size_t) noexcept nogil
    int (*cudssDataCreate)(Object, Object*) noexcept nogil
    int (*cudssDataDestroy)(Object, Object) noexcept nogil
    int (*cudssDataSet)(Object, Object, int, const void*, size_t) noexcept nogil
    int (*cudssDataGet)(Object, Object, int, void*, size_t, size_t*) noexcept nogil
    int (*cudssMatrixCreateCsr)(
        Object*, int64_t, int64_t, int64_t, const void*, const void*, const void*, const void*, int, int, int, int, int,
        int) noexcept nogil
    int (*cudssMatrixCreateDn)(Object*, int64_t, int64_t, int64_t, const void*, int, int) noexcept nogil
    int (*cudssMatrixSetValues)(Object, const void*) noexcept nogil
    int (*cudssMatrixDestroy)(Object) noexcept nogil
    int (*cudssExecute)(Object, int, Object, Object, Object, Object, Object) noexcept nogil

# in the order of Functions
NAMES = (
    "cudssGetProperty", "cudssCreate", "cudssDestroy", "cudssSetStream", "cudssSetDeviceMemHandler", "cudssConfigCreate",
    "cudssConfigDestroy", "cudssConfigSet", "cudssDataCreate", "cudssDataDestroy", "cudssDataSet", "cudssDataGet",
    "cudssMatrixCreateCsr", "cudssMatrixCreateDn", "cudssMatrixSetValues", "cudssMatrixDestroy", "cudssExecute",
)

STATUS = (
    "success", "not initialized", "allocation failed", "invalid value", "not supported", "execution failed",
    "internal error", "refinement failed",
)
cdef int ALLOC_FAILED = 2, NOT_SUPPORTED = 4

cdef int VALUE_TYPE[4]  # cudaDataType_t of float32, float64, complex64, complex128
VALUE_TYPE[:] = [0, 1, 4, 5]
cdef int INT32 = 10  # CUDA_R_32I


cdef class Library:
    """The functions of one libcudss. It is never unloaded.

    Raises:
        OSError: there is no such library, it needs another that is not there, or it is no cuDSS.
    """
    cdef Functions call
    cdef readonly tuple version

    def __init__(self, str path):
        cdef bytes name = os.fsencode(path), symbol
        cdef const char* file = name
        cdef void* library
        cdef void** slot = <void**> &self.call
        cdef int k, value
        with nogil:
            library = dlopen(file, RTLD_NOW | RTLD_LOCAL)
        if library == NULL:
            raise OSError((<bytes> dlerror()).decode(errors="replace"))
        for k in range(len(NAMES)):
            symbol = NAMES[k].encode()
            slot[k] = dlsym(library, symbol)
            if slot[k] == NULL:
                raise OSError(f"{path} lacks {NAMES[k]}")
        version = []
        for k in range(3):
            value = -1
            check(self.call.cudssGetProperty(k, &value), "cudssGetProperty")
            version.append(value)
        self.version = tuple(version)


cdef int check(int status, str function) except -1:
    if status == 0:
        return 0
    what = STATUS[status] if 0 <= status < len(STATUS) else f"status {status}"
    if status == ALLOC_FAILED:
        raise MemoryError(f"{function}: {what}: the device has not enough memory")
    if status == NOT_SUPPORTED:
        raise NotImplementedError(f"{function}: {what} by this version of cuDSS")
    raise RuntimeError(f"{function}: {what}; CUDSS_LOG_LEVEL=5 in the environment makes cuDSS say more")


cdef int allocate(void* context, void** pointer, size_t size, Object stream) noexcept with gil:
    handle = <Handle> context
    try:
        pointer[0] = <void*> <uintptr_t> handle.allocator(size, <uintptr_t> stream)
        handle.allocated += size
        return 0
    except BaseException as error:
        handle.errors[get_ident()] = error
        return 1


cdef int release(void* context, void* pointer, size_t size, Object stream) noexcept with gil:
    handle = <Handle> context
    try:
        handle.deallocator(<uintptr_t> pointer)
        handle.allocated -= size
        return 0
    except BaseException as error:
        handle.errors[get_ident()] = error
        return 1


@cython.no_gc_clear  # its destructor needs what it refers to
cdef class Handle:
    """The library's context for one device, the current one.

    Args:
        allocator: (bytes, stream) -> address of device memory; deallocator: address -> None.

    Attributes:
        allocated: bytes that cuDSS holds through them.
    """
    cdef readonly Library library
    cdef Object object
    cdef pthread_mutex_t busy
    cdef MemoryHandler handler
    cdef object allocator, deallocator
    cdef dict errors             # thread -> what its callback met
    cdef vector[Object] doomed   # data to be destroyed; touched only while the GIL is held
    cdef readonly int64_t allocated

    def __cinit__(self):
        self.errors = {}
        pthread_mutex_init(&self.busy, NULL)

    def __init__(self, Library library, allocator, deallocator):
        cdef Object created = NULL
        cdef int status
        if self.object != NULL:
            raise RuntimeError("a handle is made once")
        self.library, self.allocator, self.deallocator = library, allocator, deallocator
        with nogil:
            status = library.call.cudssCreate(&created)
        self.object = created
        check(status, "cudssCreate")
        memset(&self.handler, 0, sizeof(MemoryHandler))
        self.handler.context = <void*> self
        self.handler.allocate, self.handler.release = <int (*)(void*, void**, size_t, Object) noexcept nogil> allocate, \
            <int (*)(void*, void*, size_t, Object) noexcept nogil> release
        strncpy(self.handler.name, "spcache", 63)
        check(library.call.cudssSetDeviceMemHandler(self.object, &self.handler), "cudssSetDeviceMemHandler")

    def __dealloc__(self):
        if self.object != NULL:
            self.sweep()
            with nogil:
                self.library.call.cudssDestroy(self.object)
        pthread_mutex_destroy(&self.busy)

    cdef void sweep(self) noexcept:
        """Destroys what could not be destroyed when it was freed."""
        cdef vector[Object] doomed
        cdef Object data
        doomed.swap(self.doomed)
        for data in doomed:
            with nogil:
                pthread_mutex_lock(&self.busy)
                self.library.call.cudssDataDestroy(self.object, data)
                pthread_mutex_unlock(&self.busy)

    cdef int settle(self, int status, str function) except -1:
        """After a call: raises what its callback met, or what the status says."""
        if not self.doomed.empty():
            self.sweep()
        error = self.errors.pop(get_ident(), None) if self.errors else None
        if status != 0 and error is not None:
            raise error
        return check(status, function)

    def execute(self, int phase, Config config, Data data, Matrix A, Matrix x, Matrix b, uintptr_t stream):
        """Runs phases (OR-ed) on a stream, without waiting for the device."""
        cdef int status
        with nogil:
            pthread_mutex_lock(&self.busy)
            status = self.library.call.cudssSetStream(self.object, <Object> stream)
            if status == 0:
                status = self.library.call.cudssExecute(
                    self.object, phase, config.object, data.object, A.object, x.object, b.object)
            pthread_mutex_unlock(&self.busy)
        self.settle(status, "cudssExecute")


@cython.no_gc_clear  # its destructor needs what it refers to
cdef class Config:
    """Settings of the solver: number -> int."""
    cdef Library library
    cdef Object object

    def __init__(self, Library library, dict settings):
        cdef int value
        self.library = library
        check(library.call.cudssConfigCreate(&self.object), "cudssConfigCreate")
        for parameter, setting in settings.items():
            value = setting
            check(library.call.cudssConfigSet(self.object, parameter, &value, sizeof(int)),
                  f"cudssConfigSet({parameter}, {setting})")

    def __dealloc__(self):
        if self.object != NULL:
            self.library.call.cudssConfigDestroy(self.object)


@cython.no_gc_clear  # its destructor needs what it refers to
cdef class Matrix:
    """A descriptor: of a square CSR matrix, or of dense columns; owns no memory."""
    cdef Library library
    cdef Object object

    @staticmethod
    def csr(Library library, int64_t n, int64_t nnz, uintptr_t indptr, uintptr_t indices, uintptr_t values, int dtype,
            int mtype, int view):
        """indptr [n + 1; int32], indices [nnz; int32], values [nnz]."""
        cdef Matrix new = Matrix()
        if n < 1 or nnz < 1 or not 0 <= dtype < 4 or not 0 <= mtype < 5 or not 0 <= view < 3:
            raise ValueError("not a matrix that cuDSS takes")
        new.library = library
        check(library.call.cudssMatrixCreateCsr(
            &new.object, n, n, nnz, <void*> indptr, NULL, <void*> indices, <void*> values, INT32, INT32,
            VALUE_TYPE[dtype], mtype, view, 0), "cudssMatrixCreateCsr")
        return new

    @staticmethod
    def dense(Library library, int64_t n, int64_t columns, uintptr_t values, int dtype):
        """values [columns, n]: one column after the other."""
        cdef Matrix new = Matrix()
        if n < 1 or columns < 1 or not 0 <= dtype < 4:
            raise ValueError("not a matrix that cuDSS takes")
        new.library = library
        check(library.call.cudssMatrixCreateDn(&new.object, n, columns, n, <void*> values, VALUE_TYPE[dtype], 0),
              "cudssMatrixCreateDn")
        return new

    def set_values(self, uintptr_t values):
        check(self.library.call.cudssMatrixSetValues(self.object, <void*> values), "cudssMatrixSetValues")

    def __dealloc__(self):
        if self.object != NULL:
            self.library.call.cudssMatrixDestroy(self.object)


@cython.no_gc_clear  # its destructor needs what it refers to
cdef class Data:
    """What cuDSS keeps of one matrix: analysis and factor."""
    cdef Handle handle
    cdef Object object

    def __init__(self, Handle handle):
        cdef int status
        cdef Object created = NULL
        if self.object != NULL:
            raise RuntimeError("data are made once")
        self.handle = handle
        with nogil:
            pthread_mutex_lock(&handle.busy)
            status = handle.library.call.cudssDataCreate(handle.object, &created)
            pthread_mutex_unlock(&handle.busy)
        self.object = created
        handle.settle(status, "cudssDataCreate")

    def __dealloc__(self):
        cdef Handle handle = self.handle
        if self.object == NULL:
            return
        if pthread_mutex_trylock(&handle.busy) != 0:
            handle.doomed.push_back(self.object)
            return
        with nogil:
            handle.library.call.cudssDataDestroy(handle.object, self.object)
            pthread_mutex_unlock(&handle.busy)

    def set(self, int parameter, int32_t[::1] numbers, uintptr_t stream):
        """Copies numbers, in the order of the stream."""
        cdef int status
        cdef size_t size = sizeof(int32_t) * numbers.shape[0]
        with nogil:
            pthread_mutex_lock(&self.handle.busy)
            status = self.handle.library.call.cudssSetStream(self.handle.object, <Object> stream)
            if status == 0:
                status = self.handle.library.call.cudssDataSet(
                    self.handle.object, self.object, parameter, &numbers[0], size)
            pthread_mutex_unlock(&self.handle.busy)
        self.handle.settle(status, f"cudssDataSet({parameter})")

    def get(self, int parameter, out, uintptr_t stream):
        """Reads into a NumPy array of the right type, waiting for the device where it has to."""
        cdef unsigned char[::1] memory = out.view("u1")
        cdef size_t written = 0
        cdef int status
        with nogil:
            pthread_mutex_lock(&self.handle.busy)
            status = self.handle.library.call.cudssSetStream(self.handle.object, <Object> stream)
            if status == 0:
                status = self.handle.library.call.cudssDataGet(
                    self.handle.object, self.object, parameter, &memory[0], memory.shape[0], &written)
            pthread_mutex_unlock(&self.handle.busy)
        self.handle.settle(status, f"cudssDataGet({parameter})")
        return out
