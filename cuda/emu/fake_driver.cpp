// A libcuda.so for tests: the driver's functions that we call, over the emulator.
//
// HAT_FAKE_DRIVER in the environment says what is wrong with it: nothing, "stub", "no-gpu",
// "old-driver", "old-gpu", "other-gpu" (a capability that has no machine code of ours, so PTX),
// "other-gpu-old-driver", "no-memory", "no-memory-once", "fault" (each kernel faults), "no-graphs", "no-pinned".
// HAT_FAKE_AFTER says how many allocations or kernels go well before that. Handles are checked.
//
// Work is done as late as a driver may do it: when somebody waits for the stream, or frees memory. A
// copy from pinned memory reads it only then.
#include "emulator.cpp"

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>

namespace {

constexpr int INVALID_VALUE = 1, NO_MEMORY = 2, STUB = 34, NO_GPU = 100, INVALID_IMAGE = 200,
              INVALID_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719;
int stream_of_ours, context_of_ours;
thread_local void *current_context;
std::atomic<int> sticky;
using Work = std::function<void()>;
struct Graph {
  std::vector<Work> launches;
};
std::recursive_mutex queue_lock;
std::deque<Work> later;            // what the stream has to do
Graph *capturing;                  // or where launches go instead
std::map<const char *, size_t> pinned;

bool is(const char *what) {
  const char *mode = getenv("HAT_FAKE_DRIVER");
  return mode && strcmp(mode, what) == 0;
}
/// How many went well before this one, and how many shall.
bool is_after(std::atomic<int> &count) {
  const char *after = getenv("HAT_FAKE_AFTER");
  return count++ >= (after ? atoi(after) : 0);
}
std::atomic<int> allocations, launches;
std::atomic<bool> lacked;
bool lacks_memory() {
  if (is("no-memory")) return is_after(allocations);
  return is("no-memory-once") && is_after(allocations) && !lacked.exchange(true);
}
/// What every call says first.
int state() { return sticky ? sticky.load() : current_context == &context_of_ours ? 0 : INVALID_CONTEXT; }

int do_all() {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  for (; !later.empty(); later.pop_front())
    if (!sticky) later.front()();
  return state();
}
bool is_pinned(const void *at, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  auto found = pinned.upper_bound((const char *)at);
  return found != pinned.begin() && (const char *)at + bytes <= std::prev(found)->first + std::prev(found)->second;
}
int queue(void *stream, Work work) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (stream != &stream_of_ours) return INVALID_VALUE;
  if (state()) return state();
  return later.push_back(std::move(work)), 0;
}

/// Bytes of an image: an ELF file ends with a table, PTX with a zero.
size_t image_bytes(const unsigned char *image) {
  if (memcmp(image, "\x7f" "ELF", 4) != 0) return strlen((const char *)image);
  uint64_t at[2];
  uint16_t size[4];
  memcpy(at, image + 32, 16);     // program and section headers
  memcpy(size, image + 54, 8);    // entry bytes and count of both
  return std::max(at[0] + size[0] * size[1], at[1] + size[2] * size[3]);
}

struct Module {
  std::vector<char> image;
};

} // namespace

EXPORT int cuInit(unsigned) { return is("stub") ? STUB : is("no-gpu") ? NO_GPU : 0; }
EXPORT int cuDriverGetVersion(int *version) {
  *version = is("old-driver") ? 11040 : is("other-gpu-old-driver") ? 12020 : 12060;
  return 0;
}
EXPORT int cuDeviceGetCount(int *count) { return *count = 1, 0; }
EXPORT int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal ? NO_GPU + 1 : 0; }
EXPORT int cuDeviceGetName(char *name, int bytes, int) { return snprintf(name, (size_t)bytes, "Fake GPU"), 0; }
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int) {
  const int capability = is("old-gpu") ? 75 : is("other-gpu") || is("other-gpu-old-driver") ? 120 : 86;
  if (attribute != 75 && attribute != 76) return INVALID_VALUE;
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
EXPORT int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &context_of_ours, 0; }
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
EXPORT int cuCtxSetCurrent(void *context) { return current_context = context, sticky.load(); }
EXPORT int cuStreamCreate(void **stream, unsigned) { return *stream = &stream_of_ours, state(); }
EXPORT int cuStreamDestroy_v2(void *) { return do_all(); }
EXPORT int cuStreamSynchronize(void *stream) { return stream == &stream_of_ours ? do_all() : INVALID_VALUE; }
EXPORT int cuStreamBeginCapture_v2(void *stream, int mode) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (stream != &stream_of_ours || capturing || mode != 1) return INVALID_VALUE;
  queue_lock.lock(); // until the end: other threads have streams of their own
  return capturing = new Graph, state();
}
EXPORT int cuStreamEndCapture(void *stream, Graph **graph) {
  if (stream != &stream_of_ours || !capturing) return INVALID_VALUE;
  *graph = capturing, capturing = nullptr;
  queue_lock.unlock();
  return is("no-graphs") ? INVALID_VALUE : state();
}
EXPORT int cuGraphInstantiateWithFlags(Graph **made, Graph *graph, unsigned long long flags) {
  return flags ? INVALID_VALUE : (*made = new Graph(*graph), state());
}
EXPORT int cuGraphDestroy(Graph *graph) { return delete graph, state(); }
EXPORT int cuGraphExecDestroy(Graph *graph) { return do_all(), delete graph, state(); }
EXPORT int cuGraphLaunch(Graph *graph, void *stream) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  for (const Work &work : graph->launches)
    if (int code = queue(stream, work)) return code;
  return state();
}
EXPORT int cuMemHostAlloc(void **address, size_t bytes, unsigned) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (state()) return state();
  if (is("no-pinned") || posix_memalign(address, 4096, bytes)) return NO_MEMORY;
  return pinned[(const char *)*address] = bytes, 0;
}
EXPORT int cuMemFreeHost(void *address) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  return do_all(), pinned.erase((const char *)address), free(address), state();
}
EXPORT int cuGetErrorName(int code, const char **name) {
  *name = code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : code == STUB          ? "CUDA_ERROR_STUB_LIBRARY"
                                  : "CUDA_ERROR_OF_THE_FAKE";
  return 0;
}
EXPORT int cuModuleLoadData(void **module, const void *image) {
  if (state()) return state();
  const bool elf = memcmp(image, "\x7f" "ELF", 4) == 0, wants_elf = !is("other-gpu");
  if (elf != wants_elf || (uintptr_t)image % 8) return INVALID_IMAGE;
  const char *bytes = (const char *)image;
  *module = new Module{{bytes, bytes + image_bytes((const unsigned char *)image)}};
  return 0;
}
EXPORT int cuModuleUnload(void *module) { return delete (Module *)module, state(); }
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
  const std::vector<char> &image = ((Module *)module)->image;
  std::vector<char> word(name, name + strlen(name) + 1); // with its end: not the begin of another
  if (is("other-gpu")) word.back() = '(';
  if (std::search(image.begin(), image.end(), word.begin(), word.end()) == image.end()) return NOT_FOUND;
  for (const Entry &entry : ENTRIES) {
    if (strcmp(entry.name, name) == 0) return *function = (void *)&entry, state();
  }
  return NOT_FOUND;
}
EXPORT int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  if (state()) return state();
  void *at;
  if (lacks_memory() || !bytes || posix_memalign(&at, 256, bytes)) return NO_MEMORY;
  memset(at, 0xff, bytes);
  return *address = (uint64_t)at, 0;
}
EXPORT int cuMemFree_v2(uint64_t address) { return do_all(), free((void *)address), state(); }
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
  if (is_pinned(from, bytes)) return queue(stream, [=] { memcpy((void *)to, from, bytes); });
  auto copied = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
  return queue(stream, [=] { memcpy((void *)to, copied->data(), bytes); });
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
  const int code = queue(stream, [=] { memcpy(to, (const void *)from, bytes); });
  return code || is_pinned(to, bytes) ? code : do_all(); // pageable memory is waited for
}
EXPORT int cuLaunchKernel(const Entry *entry, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty,
                          unsigned tz, unsigned shared, void *stream, void **params, void **extra) {
  if (state()) return state();
  if (ty != 1 || tz != 1 || shared || extra || stream != &stream_of_ours) return INVALID_VALUE;
  const char *block = (const char *)params[0];
  auto copied = std::make_shared<std::vector<char>>(block, block + entry->params_bytes);
  const Work work = [=] {
    if (is("fault") && is_after(launches)) { sticky = ILLEGAL_ADDRESS; return; }
    const hat_emu_launch_t launch = {entry->name, copied->data(), entry->params_bytes, {x, y, z}, threads, 0};
    uint64_t counts[6];
    const char *message = hat_emu_launch(&launch, counts);
    if (message) fprintf(stderr, "%s: %s\n", entry->name, message), sticky = LAUNCH_FAILED;
  };
  if (capturing) return capturing->launches.push_back(work), 0;
  return queue(stream, work);
}
