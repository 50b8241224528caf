// Runs recorded launches again: a program by itself, so that it can be built with sanitizers.
// Each buffer is an allocation of its own, exactly as long as the launcher said.
// replay FILE.. ; 0 if all ran to their end.
#include "emulator.cpp"

#include <fstream>
#include <memory>

namespace {

using Bytes = std::vector<char>;

/// The parts of a file: each a length and content.
std::vector<Bytes> parts(const char *path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<Bytes> all;
  uint64_t length;
  while (file.read((char *)&length, sizeof length)) {
    Bytes part(length);
    if (!file.read(part.data(), (std::streamsize)length)) return {};
    all.push_back(std::move(part));
  }
  return all;
}

struct Free {
  void operator()(void *at) const { free(at); }
};

/// Runs a launch under one schedule; null, or what went wrong.
const char *replay(const std::vector<Bytes> &file, uint32_t schedule) {
  if (file.size() < 3 || file[1].size() != 16) return "no recorded launch";
  Bytes params = file[2];
  std::vector<std::unique_ptr<void, Free>> buffers;
  for (size_t i = 3; i + 1 < file.size(); i += 2) {
    const Bytes &content = file[i + 1];
    void *buffer = nullptr;
    uint64_t begin;
    memcpy(&begin, file[i].data(), sizeof begin);
    if (posix_memalign(&buffer, 256, content.size())) return "no memory";
    memcpy(buffer, content.data(), content.size());
    buffers.emplace_back(buffer);
    for (size_t at = 0; at + 8 <= params.size(); at += 8) {
      uint64_t word;
      memcpy(&word, file[2].data() + at, sizeof word);
      if (word < begin || word >= begin + content.size()) continue;
      word += (uint64_t)buffer - begin;
      memcpy(params.data() + at, &word, sizeof word);
    }
  }
  const std::string kernel(file[0].begin(), file[0].end());
  hat_emu_launch_t launch = {kernel.c_str(), params.data(), params.size(), {}, 0, schedule};
  memcpy(launch.grid, file[1].data(), sizeof launch.grid);
  memcpy(&launch.threads, file[1].data() + 12, sizeof launch.threads);
  uint64_t counts[6];
  return hat_emu_launch(&launch, counts);
}

} // namespace

int main(int count, char **paths) {
  for (int i = 1; i < count; ++i) {
    const std::vector<Bytes> file = parts(paths[i]);
    for (uint32_t schedule = 0; schedule < 4; schedule += 2) {
      if (const char *message = replay(file, schedule)) {
        fprintf(stderr, "%s: %s\n", paths[i], message);
        return 1;
      }
    }
  }
  printf("%d launches\n", count - 1);
}
