/* A simulated Ascend runtime: the functions of AscendCL that torch_npu links or looks up, on host memory.
 *
 * Device memory is one reserved range of the host's address space, cut into equal parts, one per device. Everything is
 * synchronous: a stream is a name, an event a time stamp. Kernels do not run here. An operator's launch is recorded
 * where the caller has announced that it computes the result itself (sim_enter), and fails by name everywhere else.
 *
 * Functions that torch_npu wants and that are not defined here are generated with unsupported() as their body.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    OK = 0,
    INVALID_PARAM = 107000,
    STREAM_CAPTURED = 107027,
    UNSUPPORTED = 207000,
    OUT_OF_MEMORY = 207001,
    OP_COMPILE_FAILED = 500002,
    NO_SEMANTICS = 561103,
};
enum { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, KIND_DEFAULT };
enum { CAPTURE_BEGIN, CAPTURE_END, GRAPH_EXECUTE, GRAPH_DESTROY, GROUP_BEGIN, GROUP_END, UPDATE_BEGIN, UPDATE_END, COPY };
enum { MAX_DEVICES = 64, MAX_NAMES = 4096, ALIGNMENT = 512, RELAXED = 2 };

#define CANN_VERSION "9.1.0"
#define EXPORT __attribute__((visibility("default")))

/* ---- configuration, set once before torch is imported ---- */

static char soc_name[64] = "Ascend910B1";
static int device_count = 1;
static uint64_t device_memory = 0;
static int64_t ai_cores = 24, vector_cores = 48, l2_bytes = 192 << 20;
static uint8_t *arena = NULL;

typedef struct block {
    uint64_t offset, size;
    int used;
    struct block *next;
} block;

static block *blocks[MAX_DEVICES];
static uint64_t used_bytes[MAX_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

typedef int (*event_callback)(int what, void *handle, void *other, const void *source, uint64_t bytes);
static event_callback callback = NULL;

static __thread int current_device = 0;
static __thread int golden_depth = 0;
static __thread char message[512];
static __thread char recent[512];

static int fail(int code, const char *what, const char *name) {
    snprintf(message, sizeof message, "%s: %s", name, what);
    return code;
}

EXPORT int sim_unsupported(const char *name) {
    return fail(UNSUPPORTED, "not part of the simulated Ascend runtime", name);
}

EXPORT int sim_configure(const char *soc, int devices, uint64_t memory, int64_t cores, int64_t vectors, int64_t l2) {
    if (arena != NULL || devices < 1 || devices > MAX_DEVICES || memory == 0 || memory % ALIGNMENT) return INVALID_PARAM;
    snprintf(soc_name, sizeof soc_name, "%s", soc);
    device_count = devices, device_memory = memory, ai_cores = cores, vector_cores = vectors, l2_bytes = l2;
    void *range = mmap(NULL, memory * devices, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return OUT_OF_MEMORY;
    arena = range;
    for (int device = 0; device < devices; device++) {
        blocks[device] = calloc(1, sizeof(block));
        *blocks[device] = (block){(uint64_t)device * memory, memory, 0, NULL};
    }
    return OK;
}

EXPORT void *sim_base(void) { return arena; }
EXPORT void sim_on_event(event_callback function) { callback = function; }
EXPORT void sim_enter(void) { golden_depth++; }
EXPORT void sim_leave(void) { golden_depth--; }

/* ---- what was done: launches by name, copies, synchronisations ---- */

typedef struct { const char *name; uint64_t eager, captured; } launch_count;
static launch_count launches[MAX_NAMES];
static int launch_names = 0;
/* synchronisations, graph replays, then for each of four kinds of copy: number and bytes */
static uint64_t counters[2 + 2 * 4];
enum { SYNCS, REPLAYS, COPIES };

static void *capturing = NULL;
static int updating = 0;  /* a task of a captured graph is given other arguments: no launch of its own */
static int capture_broken = 0;

static void count_launch(const char *name) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < launch_names && launches[i].name != name && strcmp(launches[i].name, name)) i++;
    if (i == launch_names && i < MAX_NAMES) launches[launch_names++].name = strdup(name);
    if (i < MAX_NAMES) *(capturing || updating ? &launches[i].captured : &launches[i].eager) += 1;
    pthread_mutex_unlock(&lock);
}

EXPORT int sim_launch(const char *name) {
    if (golden_depth == 0) return fail(NO_SEMANTICS, "the simulated Ascend runtime has no semantics for it", name);
    count_launch(name);
    return OK;
}

EXPORT void sim_record(const char *name) { count_launch(name); }
EXPORT int sim_launch_names(void) { return launch_names; }
EXPORT const char *sim_launch_count(int i, uint64_t *eager, uint64_t *captured) {
    *eager = launches[i].eager, *captured = launches[i].captured;
    return launches[i].name;
}
EXPORT void sim_counters(uint64_t *out) { memcpy(out, counters, sizeof counters); }

/* 0, or an error whose message the listener has set with sim_explain */
static int tell(int what, void *handle, void *other, const void *source, uint64_t bytes) {
    return callback ? callback(what, handle, other, source, bytes) : OK;
}
EXPORT void sim_explain(const char *text) { snprintf(message, sizeof message, "%s", text); }

/* ---- memory ---- */

static int device_of(const void *pointer) {
    const uint8_t *p = pointer;
    if (arena == NULL || p < arena || p >= arena + device_memory * device_count) return -1;
    return (int)((uint64_t)(p - arena) / device_memory);
}

EXPORT int aclrtMalloc(void **pointer, size_t size, int policy) {
    (void)policy;
    *pointer = NULL;
    if (size == 0) return fail(INVALID_PARAM, "zero bytes asked for", "aclrtMalloc");
    uint64_t bytes = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    pthread_mutex_lock(&lock);
    block *b = blocks[current_device];
    while (b && (b->used || b->size < bytes)) b = b->next;
    if (b) {
        if (b->size > bytes) {
            block *rest = malloc(sizeof *rest);
            *rest = (block){b->offset + bytes, b->size - bytes, 0, b->next};
            b->next = rest, b->size = bytes;
        }
        b->used = 1, used_bytes[current_device] += bytes;
        *pointer = arena + b->offset;
    }
    pthread_mutex_unlock(&lock);
    return b ? OK : fail(OUT_OF_MEMORY, "the simulated device's memory is used up", "aclrtMalloc");
}

EXPORT int aclrtMallocAlign32(void **pointer, size_t size, int policy) { return aclrtMalloc(pointer, size, policy); }

static void merge(block *b) {
    while (b) {
        block *after = b->next;
        if (after && !b->used && !after->used) {
            b->size += after->size, b->next = after->next;
            free(after);
        } else b = after;
    }
}

EXPORT int aclrtFree(void *pointer) {
    int device = device_of(pointer), found = 0;
    if (device < 0) return fail(INVALID_PARAM, "no device memory", "aclrtFree");
    pthread_mutex_lock(&lock);
    for (block *b = blocks[device]; b && !found; b = b->next)
        if (b->used && arena + b->offset == (uint8_t *)pointer) {
            b->used = 0, used_bytes[device] -= b->size, found = 1;
            uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = ((uintptr_t)pointer + page - 1) / page * page;
            uintptr_t to = ((uintptr_t)pointer + b->size) / page * page;
            if (to > from) madvise((void *)from, to - from, MADV_DONTNEED);
        }
    merge(blocks[device]);
    pthread_mutex_unlock(&lock);
    return found ? OK : fail(INVALID_PARAM, "freed twice or never allocated", "aclrtFree");
}

EXPORT int aclrtMallocHost(void **pointer, size_t size) { return posix_memalign(pointer, 64, size ? size : 1) ? OUT_OF_MEMORY : OK; }
EXPORT int aclrtFreeHost(void *pointer) { free(pointer); return OK; }

EXPORT int aclrtGetMemInfo(int attribute, size_t *available, size_t *total) {
    (void)attribute;
    *total = device_memory, *available = device_memory - used_bytes[current_device];
    return OK;
}

/* torch_npu waits for the default stream while another one is captured, so waiting for other streams is allowed;
 * for the whole device, an event or a blocking copy (stream is NULL), a thread must have relaxed its mode. */
static __thread int thread_mode = 0;
static int begin_mode = 0;

static int may_wait(const char *name, const void *stream) {
    if (capturing && (stream == capturing || (stream == NULL && thread_mode != RELAXED && begin_mode != RELAXED))) {
        capture_broken = 1;
        return fail(STREAM_CAPTURED, "the host waits for the device while a graph is captured", name);
    }
    return OK;
}

static int synchronise(const char *name, const void *stream) {
    int code = may_wait(name, stream);
    if (code == OK) __sync_fetch_and_add(&counters[SYNCS], 1);
    return code;
}

static int copy(const char *name, void *to, size_t room, const void *from, size_t bytes, int kind) {
    int to_device = device_of(to) >= 0, from_device = device_of(from) >= 0;
    if (bytes > room) return fail(INVALID_PARAM, "more bytes than the destination holds", name);
    if (kind != KIND_DEFAULT && kind != to_device + 2 * from_device)
        return fail(INVALID_PARAM, "the kind of copy does not fit the two addresses", name);
    kind = to_device + 2 * from_device;
    __sync_fetch_and_add(&counters[COPIES + 2 * kind], 1);
    __sync_fetch_and_add(&counters[COPIES + 2 * kind + 1], bytes);
    if (capturing && golden_depth == 0) return tell(COPY, to, NULL, from, bytes);
    memmove(to, from, bytes);
    return OK;
}

EXPORT int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
    int code = may_wait("aclrtMemcpy", NULL);
    return code ? code : copy("aclrtMemcpy", to, room, from, bytes, kind);
}
EXPORT int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
    (void)stream;
    return copy("aclrtMemcpyAsync", to, room, from, bytes, kind);
}
EXPORT int aclrtMemset(void *to, size_t room, int value, size_t bytes) {
    if (bytes > room) return fail(INVALID_PARAM, "more bytes than the destination holds", "aclrtMemset");
    memset(to, value, bytes);
    return OK;
}

/* ---- devices, contexts, versions ---- */

EXPORT int aclInit(const char *config) { (void)config; return OK; }
EXPORT int aclFinalize(void) { return OK; }
EXPORT const char *aclGetRecentErrMsg(void) {
    snprintf(recent, sizeof recent, "%s", message);
    message[0] = 0;
    return recent;
}
EXPORT void aclAppLog(void) {}
EXPORT int aclrtSetDevice(int device) {
    if (device < 0 || device >= device_count) return fail(INVALID_PARAM, "no such device", "aclrtSetDevice");
    current_device = device;
    return OK;
}
EXPORT int aclrtGetDevice(int *device) { *device = current_device; return OK; }
EXPORT int aclrtResetDevice(int device) { (void)device; return OK; }
EXPORT int aclrtGetDeviceCount(unsigned *count) { *count = (unsigned)device_count; return OK; }
EXPORT int aclrtGetCurrentContext(void **context) { *context = &current_device; return OK; }
EXPORT int aclrtSetCurrentContext(void *context) { (void)context; return OK; }
EXPORT const char *aclrtGetSocName(void) { return soc_name; }
EXPORT int aclGetDeviceCapability(unsigned device, int what, int64_t *value) {
    (void)device;
    *value = what == 0 ? ai_cores : what == 1 ? vector_cores : what == 2 ? l2_bytes : 0;
    return OK;
}
EXPORT int aclrtDeviceCanAccessPeer(int *able, int device, int peer) { (void)device, (void)peer; *able = 1; return OK; }
EXPORT int aclrtDeviceEnablePeerAccess(int peer, unsigned flags) { (void)peer, (void)flags; return OK; }
EXPORT int aclrtDeviceGetBareTgid(int *pid) { *pid = (int)getpid(); return OK; }
/* torch_npu asks for the version of CANN by both; the second writes into a structure that begins with the text */
EXPORT int aclsysGetVersionStr(const char *package, char *version) { (void)package; strcpy(version, CANN_VERSION); return OK; }
EXPORT int aclsysGetCANNVersion(int package, char *version) { (void)package; strcpy(version, CANN_VERSION); return OK; }
EXPORT int aclrtSetDeviceSatMode(int mode) { (void)mode; return OK; }
EXPORT int aclrtSetOpExecuteTimeOut(unsigned seconds) { (void)seconds; return OK; }
EXPORT int aclrtSetStreamOverflowSwitch(void *stream, unsigned flag) { (void)stream, (void)flag; return OK; }
EXPORT int aclrtSetStreamAttribute(void *stream, int attribute, void *value) { (void)stream, (void)attribute, (void)value; return OK; }
EXPORT int aclrtGetSysParamOpt(int option, int64_t *value) { (void)option; *value = 0; return OK; }
EXPORT int aclrtSetSysParamOpt(int option, int64_t value) { (void)option, (void)value; return OK; }
EXPORT int aclrtCtxSetSysParamOpt(int option, int64_t value) { (void)option, (void)value; return OK; }
EXPORT size_t aclGetCompileoptSize(int option) { (void)option; return 16; }
EXPORT int aclGetCompileopt(int option, char *value, size_t room) { (void)option; snprintf(value, room, "disable"); return OK; }
EXPORT int aclSetCompileopt(int option, const char *value) { (void)option, (void)value; return OK; }
EXPORT int aclmdlInitDump(void) { return OK; }
EXPORT int aclmdlFinalizeDump(void) { return OK; }

/* ---- streams and events ---- */

typedef struct { int device; } stream;
typedef struct { struct timespec at; } event;

static int new_stream(void **out) {
    stream *s = calloc(1, sizeof *s);
    s->device = current_device, *out = s;
    return OK;
}
EXPORT int aclrtCreateStream(void **out) { return new_stream(out); }
EXPORT int aclrtCreateStreamWithConfig(void **out, unsigned priority, unsigned flags) { (void)priority, (void)flags; return new_stream(out); }
EXPORT int aclrtDestroyStream(void *s) { free(s); return OK; }
EXPORT int aclrtDestroyStreamForce(void *s) { free(s); return OK; }
EXPORT int aclrtSynchronizeStream(void *s) { (void)s; return synchronise("aclrtSynchronizeStream", s); }
EXPORT int aclrtSynchronizeStreamWithTimeout(void *s, int ms) { (void)s, (void)ms; return synchronise("aclrtSynchronizeStreamWithTimeout", s); }
EXPORT int aclrtSynchronizeDeviceWithTimeout(int ms) { (void)ms; return synchronise("aclrtSynchronizeDeviceWithTimeout", NULL); }
EXPORT int aclrtSynchronizeDevice(void) { return synchronise("aclrtSynchronizeDevice", NULL); }

static int new_event(void **out) { *out = calloc(1, sizeof(event)); return *out ? OK : OUT_OF_MEMORY; }
EXPORT int aclrtCreateEventExWithFlag(void **out, unsigned flag) { (void)flag; return new_event(out); }
EXPORT int aclrtCreateEventWithFlag(void **out, unsigned flag) { (void)flag; return new_event(out); }
EXPORT int aclrtDestroyEvent(void *e) { free(e); return OK; }
EXPORT int aclrtRecordEvent(void *e, void *s) { (void)s; clock_gettime(CLOCK_MONOTONIC, &((event *)e)->at); return OK; }
EXPORT int aclrtResetEvent(void *e, void *s) { (void)e, (void)s; return OK; }
EXPORT int aclrtQueryEventStatus(void *e, int *status) { (void)e; *status = 1; return OK; }
EXPORT int aclrtStreamWaitEvent(void *s, void *e) { (void)s, (void)e; return OK; }
EXPORT int aclrtSynchronizeEvent(void *e) { (void)e; return synchronise("aclrtSynchronizeEvent", NULL); }
EXPORT int aclrtEventElapsedTime(float *ms, void *start, void *end) {
    struct timespec a = ((event *)start)->at, b = ((event *)end)->at;
    *ms = (float)((double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6);
    return OK;
}

/* ---- the older route to an operator: described, compiled and executed by name ---- */

static char handle[64];  /* what a description is, is never read */
EXPORT void *aclCreateDataBuffer(void *data, size_t size) { (void)data, (void)size; return handle; }
EXPORT int aclDestroyDataBuffer(const void *buffer) { (void)buffer; return OK; }
EXPORT void *aclCreateTensorDesc(int type, int rank, const int64_t *shape, int format) { (void)type, (void)rank, (void)shape, (void)format; return handle; }
EXPORT void aclDestroyTensorDesc(const void *description) { (void)description; }
EXPORT void aclSetTensorDescName(void *description, const char *name) { (void)description, (void)name; }
EXPORT int aclSetTensorFormat(void *description, int format) { (void)description, (void)format; return OK; }
EXPORT int aclSetTensorPlaceMent(void *description, int place) { (void)description, (void)place; return OK; }
EXPORT int aclSetTensorShape(void *description, int rank, const int64_t *shape) { (void)description, (void)rank, (void)shape; return OK; }
EXPORT void *aclopCreateAttr(void) { return handle; }
EXPORT void aclopDestroyAttr(const void *attributes) { (void)attributes; }
#define IGNORED_ATTRIBUTE(name) EXPORT int name(void *attributes) { (void)attributes; return OK; }
IGNORED_ATTRIBUTE(aclopSetAttrBool)
IGNORED_ATTRIBUTE(aclopSetAttrDataType)
IGNORED_ATTRIBUTE(aclopSetAttrFloat)
IGNORED_ATTRIBUTE(aclopSetAttrInt)
IGNORED_ATTRIBUTE(aclopSetAttrListBool)
IGNORED_ATTRIBUTE(aclopSetAttrListFloat)
IGNORED_ATTRIBUTE(aclopSetAttrListInt)
IGNORED_ATTRIBUTE(aclopSetAttrListListInt)
IGNORED_ATTRIBUTE(aclopSetAttrString)

static int legacy_launch(const char *type) {
    char name[128];
    snprintf(name, sizeof name, "aclop:%s", type);
    int code = sim_launch(name);
    return code ? OP_COMPILE_FAILED : OK;
}
EXPORT int aclopCompileAndExecute(const char *type) { return legacy_launch(type); }
EXPORT int aclopCompileAndExecuteV2(const char *type) { return legacy_launch(type); }

/* ---- graphs: the tape is the caller's, these are its events ---- */

static void *captured_graph = NULL;

EXPORT int aclmdlRICaptureBegin(void *s, int mode) {
    if (capturing) return fail(STREAM_CAPTURED, "a stream is being captured already", "aclmdlRICaptureBegin");
    capturing = s, begin_mode = mode, capture_broken = 0, captured_graph = calloc(1, 64);
    return tell(CAPTURE_BEGIN, s, captured_graph, NULL, 0);
}
EXPORT int aclmdlRICaptureEnd(void *s, void **graph) {
    if (capturing != s) return fail(INVALID_PARAM, "the stream is not being captured", "aclmdlRICaptureEnd");
    *graph = captured_graph, capturing = NULL;
    int code = tell(CAPTURE_END, s, captured_graph, NULL, 0);
    if (capture_broken) return fail(STREAM_CAPTURED, "the host waited for the device while a graph is captured", "aclmdlRICaptureEnd");
    return code;
}
EXPORT int aclmdlRICaptureGetInfo(void *s, int *status, void **graph) {
    *status = s == capturing && capturing != NULL;
    if (graph) *graph = *status ? captured_graph : NULL;
    return OK;
}
EXPORT int aclmdlRICaptureThreadExchangeMode(int *mode) {
    int before = thread_mode;
    thread_mode = *mode, *mode = before;
    return OK;
}
EXPORT int aclmdlRIExecuteAsync(void *graph, void *s) {
    (void)s;
    __sync_fetch_and_add(&counters[REPLAYS], 1);
    return tell(GRAPH_EXECUTE, graph, NULL, NULL, 0);
}
EXPORT int aclmdlRIDestroy(void *graph) {
    int code = tell(GRAPH_DESTROY, graph, NULL, NULL, 0);
    free(graph);
    return code;
}
EXPORT int aclmdlRICaptureTaskGrpBegin(void *s) { return tell(GROUP_BEGIN, s, NULL, NULL, 0); }
EXPORT int aclmdlRICaptureTaskGrpEnd(void *s, void **group) {
    *group = calloc(1, 64);
    return tell(GROUP_END, s, *group, NULL, 0);
}
EXPORT int aclmdlRICaptureTaskUpdateBegin(void *s, void *group) {
    updating = 1;
    return tell(UPDATE_BEGIN, s, group, NULL, 0);
}
EXPORT int aclmdlRICaptureTaskUpdateEnd(void *s) {
    updating = 0;
    return tell(UPDATE_END, s, NULL, NULL, 0);
}

/* ---- what operators are described with on the newer route ---- */

EXPORT void *aclCreateTensor(void) { return handle; }
EXPORT void *aclCreateScalar(void) { return handle; }
EXPORT void *aclCreateIntArray(void) { return handle; }
EXPORT void *aclCreateBoolArray(void) { return handle; }
EXPORT void *aclCreateFloatArray(void) { return handle; }
EXPORT void *aclCreateTensorList(void) { return handle; }
EXPORT void *aclCreateScalarList(void) { return handle; }
EXPORT int aclDestroyAclOpExecutor(void *p) { (void)p; return OK; }
EXPORT int aclDestroyTensor(void *p) { (void)p; return OK; }
EXPORT int aclDestroyScalar(void *p) { (void)p; return OK; }
EXPORT int aclDestroyIntArray(void *p) { (void)p; return OK; }
EXPORT int aclDestroyBoolArray(void *p) { (void)p; return OK; }
EXPORT int aclDestroyFloatArray(void *p) { (void)p; return OK; }
EXPORT int aclDestroyTensorList(void *p) { (void)p; return OK; }
EXPORT int aclDestroyScalarList(void *p) { (void)p; return OK; }
