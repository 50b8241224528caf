// A libcuda.so for tests: the driver's functions that we call, over the emulator.
//
// HAT_FAKE_DRIVER in the environment says what is wrong with it: nothing, "stub", "no-gpu",
// "old-driver", "old-gpu", "other-gpu" (a capability that has no machine code of ours, so PTX),
// "other-gpu-old-driver", "no-memory", "no-memory-once", "fault" (each kernel faults), "fault-1" (each
// kernel of GPU 1), "no-graphs", "no-pinned", "no-peer" (no GPU reads another one's memory), "integrated"
// (no memory but the host's), "integrated-other-pointer" (where a kernel sees registered memory elsewhere),
// "integrated-refused", "integrated-writable" (registers what may be written to alone),
// "integrated-no-register",
// "bad-ptx" (its compiler takes no PTX).
// HAT_FAKE_AFTER says how many allocations or kernels go well before that. HAT_FAKE_DEVICES says how many
// GPUs there are, 1 if nothing does. HAT_FAKE_COUNTS names a file that keeps what was copied (`Counts`).
//
// Handles are checked, and which GPU they are of: a kernel that is handed memory of another GPU faults,
// unless it was given access, and so does one that is handed host memory that is not registered. Work is done as late as a driver may do it: when somebody waits for its
// stream, or frees memory. A copy reads its source only then, if that is pinned or on a GPU.
#include "emulator.cpp"

#include <atomic>
#include <chrono>
#include <deque>
#include <fcntl.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr int INVALID_VALUE = 1, NO_MEMORY = 2, STUB = 34, NO_GPU = 100, INVALID_IMAGE = 200,
              INVALID_CONTEXT = 201, NO_PEER_ACCESS = 217, INVALID_PTX = 218, INVALID_HANDLE = 400, NOT_FOUND = 500,
              ILLEGAL_ADDRESS = 700, PEER_ALREADY = 704, REGISTERED_ALREADY = 712, NOT_REGISTERED = 713,
              NOT_READY = 600, LAUNCH_FAILED = 719, NOT_PERMITTED = 800, NOT_SUPPORTED = 801;
constexpr size_t PAGE = 4096;
constexpr int DEVICES_MAX = 4;

using Work = std::function<void()>;
struct Graph {
  std::vector<Work> launches;
};
struct Context {
  std::atomic<int> sticky, retained;
  std::set<Context *> peers; // whose memory its kernels may read and write
};
struct Stream {
  Context *context;
  std::deque<Work> later; // what it has to do
  Graph *capturing;       // or where launches go instead
};
struct Range {
  size_t bytes;
  Context *context; // null for memory of the host
};
/// What was copied; of GPU 1 only what its streams did.
struct Counts {
  std::atomic<uint64_t> up_bytes, down_bytes, up_bytes_1, down_bytes_1, peer_copies, peer_bytes, staged_copies,
      same_gpu_copies, allocations, allocated_bytes, registered, unregistered, registered_bytes,
      machine_code_modules, ptx_modules, carveouts, asleep;
};
struct Event {
  Context *context;
  bool is_over;
  std::chrono::steady_clock::time_point at;
};

Context contexts[DEVICES_MAX]; // of each GPU the one that all share
thread_local Context *current_context;
std::recursive_mutex queue_lock;
std::set<Stream *> streams;
std::map<const char *, Range> allocated, pinned;
/// By whole pages of the host: where the GPU sees them, and as what they were named.
struct View {
  size_t bytes;
  char *seen;
  const void *named;
};
std::map<const char *, View> registered;

const char *text_of(const char *name) {
  const char *text = getenv(name);
  return text ? text : "";
}
bool is(const char *what) { return strcmp(text_of("HAT_FAKE_DRIVER"), what) == 0; }
bool is_integrated() { return strncmp(text_of("HAT_FAKE_DRIVER"), "integrated", 10) == 0; }
int devices() {
  const int count = atoi(text_of("HAT_FAKE_DEVICES"));
  return std::min(count < 1 ? 1 : count, DEVICES_MAX);
}
int device_of(const Context *context) { return (int)(context - contexts); }
/// In a file that is mapped, so that it outlives a process that is killed.
Counts &counts() {
  static Counts *kept = [] {
    static Counts unkept;
    const int file = open(text_of("HAT_FAKE_COUNTS"), O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof unkept)) return &unkept;
    void *at = mmap(nullptr, sizeof unkept, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    return at == MAP_FAILED ? &unkept : (Counts *)at;
  }();
  return *kept;
}
/// How many went well before this one, and how many shall.
bool is_after(std::atomic<int> &count) { return count++ >= atoi(text_of("HAT_FAKE_AFTER")); }
std::atomic<int> allocations, launches;
std::atomic<bool> lacked;
bool lacks_memory() {
  if (is("no-memory")) return is_after(allocations);
  return is("no-memory-once") && is_after(allocations) && !lacked.exchange(true);
}
/// What every call says first.
int state(const Context *context = current_context) {
  return !context || !context->retained ? INVALID_CONTEXT : context->sticky.load();
}

int do_all(Stream *stream) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (!streams.count(stream)) return INVALID_HANDLE;
  for (; !stream->later.empty(); stream->later.pop_front())
    if (!stream->context->sticky) stream->later.front()();
  return state(stream->context);
}
/// All work of a GPU, as freeing its memory waits for.
int do_all_of(const Context *context) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  for (Stream *stream : streams)
    if (stream->context == context) do_all(stream);
  return state(context);
}
/// The range that holds these bytes, if one does.
const Range *within(const std::map<const char *, Range> &ranges, const void *at, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  auto found = ranges.upper_bound((const char *)at);
  if (found == ranges.begin()) return nullptr;
  --found;
  return (const char *)at + bytes <= found->first + found->second.bytes ? &found->second : nullptr;
}
bool is_memory_of(const Context *context, uint64_t at, size_t bytes) {
  const Range *range = within(allocated, (const void *)at, bytes);
  return range && range->context == context;
}
int queue(Stream *stream, Work work) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (state()) return state();
  if (!streams.count(stream) || stream->context != current_context) return INVALID_HANDLE;
  return stream->later.push_back(std::move(work)), 0;
}
/// Whether something is at an address of the host.
bool is_mapped(uint64_t at) {
  unsigned char resident;
  return at >> 47 == 0 && mincore((void *)(at / PAGE * PAGE), 1, &resident) == 0;
}
bool is_seen(uint64_t at) {
  for (const auto &[page, view] : registered)
    if (at >= (uint64_t)view.seen && at < (uint64_t)view.seen + view.bytes) return true;
  return false;
}
/// Whether a kernel is handed memory that its GPU can't reach.
bool is_foreign(const Context *context, const std::vector<char> &block) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  for (size_t at = 0; at + 8 <= block.size(); at += 8) {
    uint64_t word;
    memcpy(&word, &block[at], 8);
    const Range *range = within(allocated, (const void *)word, 1);
    if (range && range->context != context && !context->peers.count(range->context)) return true;
    if (!range && !is_seen(word) && is_mapped(word)) return true;
  }
  return false;
}
/// Whether the host may write to a page.
bool is_writable(const char *page) {
  FILE *maps = fopen("/proc/self/maps", "r");
  char line[512], mode[5] = "";
  for (unsigned long begin, end; maps && fgets(line, sizeof line, maps);) {
    if (sscanf(line, "%lx-%lx %4s", &begin, &end, mode) != 3) continue;
    if ((uintptr_t)page >= begin && (uintptr_t)page < end) break;
  }
  if (maps) fclose(maps);
  return mode[1] == 'w';
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
  Context *context;
};
struct Function {
  const Entry *entry;
  Context *context;
};

} // namespace

EXPORT int cuInit(unsigned) { return is("stub") ? STUB : is("no-gpu") ? NO_GPU : 0; }
EXPORT int cuDriverGetVersion(int *version) {
  *version = is("old-driver") ? 11040 : is("other-gpu-old-driver") ? 12020 : 12060;
  return 0;
}
EXPORT int cuDeviceGetCount(int *count) { return *count = devices(), 0; }
EXPORT int cuDeviceGet(int *device, int ordinal) {
  return *device = ordinal, ordinal < 0 || ordinal >= devices() ? NO_GPU + 1 : 0;
}
EXPORT int cuDeviceGetName(char *name, int bytes, int) { return snprintf(name, (size_t)bytes, "Fake GPU"), 0; }
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int) {
  const int capability = is("old-gpu") ? 75 : is("other-gpu") || is("other-gpu-old-driver") ? 120 : 86;
  switch (attribute) {
  case 18: return *value = is_integrated(), 0;
  case 75: return *value = capability / 10, 0;
  case 76: return *value = capability % 10, 0;
  case 91: return *value = !is("integrated-other-pointer"), 0;
  case 99: return *value = !is("integrated-no-register"), 0;
  case 113: return *value = !is("integrated-writable"), 0;
  default: return INVALID_VALUE;
  }
}
EXPORT int cuDeviceCanAccessPeer(int *can, int device, int peer) {
  if (std::max(device, peer) >= devices() || std::min(device, peer) < 0) return NO_GPU + 1;
  return *can = device != peer && !is("no-peer"), 0;
}
EXPORT int cuDevicePrimaryCtxRetain(Context **context, int device) {
  return *context = &contexts[device], ++contexts[device].retained, 0;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  Context &context = contexts[device];
  if (context.retained < 1) return INVALID_CONTEXT;
  if (--context.retained) return 0;
  context.sticky = 0, context.peers.clear(); // whoever retains it again gets a new one
  for (Context &other : contexts) other.peers.erase(&context);
  return 0;
}
EXPORT int cuCtxSetCurrent(Context *context) { return current_context = context, state(); }
EXPORT int cuCtxEnablePeerAccess(Context *peer, unsigned flags) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (state()) return state();
  if (flags || peer == current_context || !peer->retained) return INVALID_VALUE;
  if (is("no-peer")) return NO_PEER_ACCESS;
  return current_context->peers.insert(peer).second ? 0 : PEER_ALREADY;
}
EXPORT int cuStreamCreate(Stream **stream, unsigned) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (state()) return state();
  return *stream = new Stream{current_context, {}, nullptr}, streams.insert(*stream), 0;
}
EXPORT int cuStreamDestroy_v2(Stream *stream) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  const int code = do_all(stream);
  if (streams.erase(stream)) delete stream;
  return code;
}
EXPORT int cuStreamSynchronize(Stream *stream) { return do_all(stream); }
EXPORT int cuStreamBeginCapture_v2(Stream *stream, int mode) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (!streams.count(stream)) return INVALID_HANDLE;
  if (stream->capturing || mode != 1) return INVALID_VALUE;
  return stream->capturing = new Graph, state();
}
EXPORT int cuStreamEndCapture(Stream *stream, Graph **graph) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (!streams.count(stream) || !stream->capturing) return INVALID_VALUE;
  *graph = stream->capturing, stream->capturing = nullptr;
  return is("no-graphs") ? INVALID_VALUE : state();
}
EXPORT int cuGraphInstantiateWithFlags(Graph **made, Graph *graph, unsigned long long flags) {
  return flags ? INVALID_VALUE : (*made = new Graph(*graph), state());
}
EXPORT int cuGraphDestroy(Graph *graph) { return delete graph, state(); }
EXPORT int cuGraphExecDestroy(Graph *graph) { return do_all_of(current_context), delete graph, state(); }
EXPORT int cuGraphLaunch(Graph *graph, Stream *stream) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  for (const Work &work : graph->launches)
    if (int code = queue(stream, work)) return code;
  return state();
}
EXPORT int cuMemHostAlloc(void **address, size_t bytes, unsigned) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (state()) return state();
  if (is("no-pinned") || posix_memalign(address, 4096, bytes)) return NO_MEMORY;
  return pinned[(const char *)*address] = {bytes, nullptr}, 0;
}
EXPORT int cuMemFreeHost(void *address) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  return do_all_of(current_context), pinned.erase((const char *)address), free(address), state();
}
EXPORT int cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (state()) return state();
  const uintptr_t begin = (uintptr_t)address / PAGE * PAGE, end = ((uintptr_t)address + bytes + PAGE - 1) / PAGE * PAGE;
  const char *page = (const char *)begin;
  const bool reads = flags & 8;
  if (!bytes || flags > 15 || !(flags & 2)) return INVALID_VALUE;
  if (is("integrated-no-register") || (reads && is("integrated-writable"))) return NOT_SUPPORTED;
  if (is("integrated-refused")) return NOT_PERMITTED;
  for (uintptr_t at = begin; at < end; at += PAGE)
    if (!is_mapped(at)) return INVALID_VALUE;
  if (!reads && !is_writable(page)) return INVALID_VALUE;
  for (const auto &[known, view] : registered)
    if (page < known + view.bytes && known < (const char *)end) return REGISTERED_ALREADY;
  char *seen = (char *)begin;
  if (is("integrated-other-pointer")) {
    if (posix_memalign((void **)&seen, PAGE, end - begin)) return NO_MEMORY;
    memcpy(seen, page, end - begin);
  }
  ++counts().registered, counts().registered_bytes += bytes;
  return registered[page] = {end - begin, seen, address}, 0;
}
EXPORT int cuMemHostUnregister(void *address) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (state()) return state();
  const char *page = (const char *)((uintptr_t)address / PAGE * PAGE);
  const auto found = registered.find(page);
  if (found == registered.end() || found->second.named != address) return NOT_REGISTERED;
  for (size_t at = 0; at < found->second.bytes; at += PAGE)
    if (!is_mapped((uintptr_t)page + at)) return fprintf(stderr, "unregistered after it was unmapped\n"), INVALID_VALUE;
  if (found->second.seen != page) free(found->second.seen);
  return ++counts().unregistered, registered.erase(found), 0;
}
EXPORT int cuMemHostGetDevicePointer_v2(uint64_t *seen, void *address, unsigned flags) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (state() || flags) return flags ? INVALID_VALUE : state();
  for (const auto &[page, view] : registered)
    if ((char *)address >= page && (char *)address < page + view.bytes)
      return *seen = (uint64_t)(view.seen + ((char *)address - page)), 0;
  return INVALID_VALUE;
}
EXPORT int cuGetErrorName(int code, const char **name) {
  *name = code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : code == STUB          ? "CUDA_ERROR_STUB_LIBRARY"
          : code == INVALID_PTX   ? "CUDA_ERROR_INVALID_PTX"
          : code == NOT_PERMITTED ? "CUDA_ERROR_NOT_PERMITTED"
                                  : "CUDA_ERROR_OF_THE_FAKE";
  return 0;
}
EXPORT int cuModuleLoadDataEx(void **module, const void *image, unsigned options, const int *names, void **values) {
  if (state()) return state();
  const bool elf = memcmp(image, "\x7f" "ELF", 4) == 0;
  if ((elf && is("other-gpu")) || (uintptr_t)image % 8) return INVALID_IMAGE;
  if (!elf && is("bad-ptx")) {
    for (unsigned option = 0; option + 1 < options; ++option) // a log, and then its size
      if (names[option] == 5 && names[option + 1] == 6)
        snprintf((char *)values[option], (size_t)values[option + 1],
                 "ptxas application ptx input, line 9; error   : Unknown symbol 'hat'\n"
                 "ptxas fatal   : Ptx assembly aborted due to errors\n");
    return INVALID_PTX;
  }
  ++(elf ? counts().machine_code_modules : counts().ptx_modules);
  const char *bytes = (const char *)image;
  *module = new Module{{bytes, bytes + image_bytes((const unsigned char *)image)}, current_context};
  return 0;
}
EXPORT int cuModuleUnload(void *module) { return delete (Module *)module, state(); }
EXPORT int cuModuleGetFunction(Function **function, Module *module, const char *name) {
  const std::vector<char> &image = module->image;
  std::vector<char> word(name, name + strlen(name) + 1); // with its end: not the begin of another
  if (image[0] != '\x7f') word.back() = '(';
  if (std::search(image.begin(), image.end(), word.begin(), word.end()) == image.end()) return NOT_FOUND;
  for (const Entry &entry : ENTRIES) {
    if (strcmp(entry.name, name)) continue;
    static std::deque<Function> kept; // for as long as the process runs
    const std::lock_guard<std::recursive_mutex> guard(queue_lock);
    kept.push_back({&entry, module->context});
    return *function = &kept.back(), state();
  }
  return NOT_FOUND;
}
/// A block's shared memory is not known here: that of the kernels which have much of it is large.
EXPORT int cuFuncGetAttribute(int *value, int attribute, const Function *function) {
  const char *name = function->entry->name;
  bool large = false;
  for (const char *known : {"attend_verify", "attend_prefill", "gemv_", "linear_"}) large |= strstr(name, known) == name;
  switch (attribute) {
  case 1: return *value = large ? 20000 : 512, state();
  case 3: return *value = 0, state();
  case 4: return *value = 64, state();
  default: return INVALID_VALUE;
  }
}
EXPORT int cuFuncSetAttribute(const Function *, int attribute, int value) {
  return attribute != 9 || value != 100 ? INVALID_VALUE : (++counts().carveouts, state());
}
EXPORT int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) {
  if (device < 0 || device >= devices()) return NO_GPU + 1;
  return flags & ~7u ? INVALID_VALUE : (counts().asleep += flags == 4, 0);
}
EXPORT int cuEventCreate(Event **event, unsigned flags) {
  return state() ? state() : flags > 7 ? INVALID_VALUE : (*event = new Event{current_context, false, {}}, 0);
}
EXPORT int cuEventRecord(Event *event, Stream *stream) {
  if (event->context != current_context) return INVALID_HANDLE;
  return queue(stream, [=] { event->is_over = true, event->at = std::chrono::steady_clock::now(); });
}
EXPORT int cuEventElapsedTime(float *milliseconds, const Event *begin, const Event *end) {
  if (state()) return state();
  if (!begin->is_over || !end->is_over) return NOT_READY;
  return *milliseconds = std::chrono::duration<float, std::milli>(end->at - begin->at).count(), 0;
}
EXPORT int cuEventDestroy_v2(Event *event) { return do_all_of(event->context), delete event, state(); }
EXPORT int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  if (state()) return state();
  void *at;
  if (lacks_memory() || !bytes || posix_memalign(&at, 256, bytes)) return NO_MEMORY;
  memset(at, 0xff, bytes);
  ++counts().allocations, counts().allocated_bytes += bytes;
  return *address = (uint64_t)at, allocated[(const char *)at] = {bytes, current_context}, 0;
}
EXPORT int cuMemFree_v2(uint64_t address) {
  const std::lock_guard<std::recursive_mutex> guard(queue_lock);
  const auto found = allocated.find((const char *)address);
  if (found == allocated.end()) return INVALID_VALUE;
  const int code = do_all_of(found->second.context);
  memset((void *)address, 0xff, found->second.bytes); // for whoever still reads it
  return allocated.erase(found), free((void *)address), code;
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, Stream *stream) {
  if (!is_memory_of(current_context, to, bytes)) return INVALID_VALUE;
  counts().up_bytes += bytes, counts().up_bytes_1 += device_of(current_context) == 1 ? bytes : 0;
  if (within(pinned, from, bytes)) return queue(stream, [=] { memcpy((void *)to, from, bytes); });
  auto copied = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
  return queue(stream, [=] { memcpy((void *)to, copied->data(), bytes); });
}
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, Stream *stream) {
  if (!is_memory_of(current_context, from, bytes)) return INVALID_VALUE;
  counts().down_bytes += bytes, counts().down_bytes_1 += device_of(current_context) == 1 ? bytes : 0;
  const int code = queue(stream, [=] { memcpy(to, (const void *)from, bytes); });
  return code || within(pinned, to, bytes) ? code : do_all(stream); // pageable memory is waited for
}
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream *stream) {
  if (!is_memory_of(current_context, to, bytes) || !is_memory_of(current_context, from, bytes)) return INVALID_VALUE;
  ++counts().same_gpu_copies;
  return queue(stream, [=] { memmove((void *)to, (const void *)from, bytes); });
}
EXPORT int cuMemcpyPeerAsync(uint64_t to, Context *to_context, uint64_t from, Context *from_context, size_t bytes,
                             Stream *stream) {
  if (state(to_context) || state(from_context)) return state(to_context) ? state(to_context) : state(from_context);
  if (!is_memory_of(to_context, to, bytes) || !is_memory_of(from_context, from, bytes)) return INVALID_VALUE;
  ++counts().peer_copies, counts().peer_bytes += bytes;
  counts().staged_copies += !to_context->peers.count(from_context);
  Context *context = current_context;
  return queue(stream, [=] {
    // What it reads may not have gone meanwhile.
    if (is_memory_of(from_context, from, bytes)) memcpy((void *)to, (const void *)from, bytes);
    else context->sticky = ILLEGAL_ADDRESS;
  });
}
EXPORT int cuLaunchKernel(const Function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty,
                          unsigned tz, unsigned shared, Stream *stream, void **params, void **extra) {
  if (state()) return state();
  if (ty != 1 || tz != 1 || shared || extra) return INVALID_VALUE;
  if (function->context != current_context || stream->context != current_context) return INVALID_HANDLE;
  const Entry *entry = function->entry;
  Context *context = current_context;
  const char *block = (const char *)params[0];
  auto copied = std::make_shared<std::vector<char>>(block, block + entry->params_bytes);
  const Work work = [=] {
    const bool faults = is("fault") ? is_after(launches)
                        : is("fault-1") && device_of(context) == 1 && is_after(launches);
    if (faults || is_foreign(context, *copied)) { context->sticky = ILLEGAL_ADDRESS; return; }
    const hat_emu_launch_t launch = {entry->name, copied->data(), entry->params_bytes, {x, y, z}, threads, 0};
    uint64_t counts[6];
    const char *message = hat_emu_launch(&launch, counts);
    if (message) fprintf(stderr, "%s: %s\n", entry->name, message), context->sticky = LAUNCH_FAILED;
  };
  if (stream->capturing) return stream->capturing->launches.push_back(work), 0;
  return queue(stream, work);
}
