#include "flash_file.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#include <sys/stat.h>
#else
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace satchel {

namespace {
std::runtime_error failure(const std::string& what) { return std::runtime_error(what + ": " + std::strerror(errno)); }

#if defined(_WIN32)  // not run yet: no Windows machine was at hand
int64_t write_at(int fd, const char* data, size_t bytes, uint64_t offset) {
  return _lseeki64(fd, int64_t(offset), SEEK_SET) < 0 ? -1 : _write(fd, data, unsigned(bytes));
}
int64_t read_at(int fd, char* data, size_t bytes, uint64_t offset) {
  static std::mutex one_at_a_time;  // the file has one position
  std::lock_guard<std::mutex> lock(one_at_a_time);
  return _lseeki64(fd, int64_t(offset), SEEK_SET) < 0 ? -1 : _read(fd, data, unsigned(bytes));
}
#else
int64_t write_at(int fd, const char* data, size_t bytes, uint64_t offset) { return pwrite(fd, data, bytes, off_t(offset)); }
int64_t read_at(int fd, char* data, size_t bytes, uint64_t offset) { return pread(fd, data, bytes, off_t(offset)); }
#endif
}  // namespace

FlashFile::FlashFile(const std::string& folder, uint64_t limit_bytes) : writable_(true), limit_bytes_(limit_bytes) {
#if defined(_WIN32)
  std::vector<char> name(folder.begin(), folder.end());
  for (char c : std::string("\\satchel-cold-XXXXXX")) name.push_back(c);
  name.push_back(0);
  if (_mktemp_s(name.data(), name.size())) throw failure("cannot name a file in " + folder);
  descriptor_ = _open(name.data(), _O_CREAT | _O_EXCL | _O_RDWR | _O_BINARY | _O_TEMPORARY, _S_IREAD | _S_IWRITE);
#else
  const std::string pattern = folder + "/satchel-cold-XXXXXX";
  std::vector<char> name(pattern.begin(), pattern.end());
  name.push_back(0);
  descriptor_ = mkstemp(name.data());
  if (descriptor_ >= 0) unlink(name.data());
#endif
  if (descriptor_ < 0) throw failure("cannot make a file in " + folder);
}

FlashFile::FlashFile(int descriptor) : writable_(false) {
#if defined(_WIN32)
  descriptor_ = _dup(descriptor);
  if (descriptor_ < 0) throw failure("cannot use the snapshot's file");
  end_ = uint64_t(_lseeki64(descriptor_, 0, SEEK_END));
#else
  descriptor_ = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (descriptor_ < 0) throw failure("cannot use the snapshot's file");
  struct stat status{};
  if (fstat(descriptor_, &status) == 0) end_ = uint64_t(status.st_size);
#endif
}

FlashFile::~FlashFile() {
#if defined(_WIN32)
  if (descriptor_ >= 0) _close(descriptor_);
#else
  if (descriptor_ >= 0) close(descriptor_);
#endif
}

int64_t FlashFile::append(const void* data, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t begin = end_;
  const bool room = writable_ && begin + bytes <= limit_bytes_;
  size_t done = 0;
  while (room && done < bytes) {
    const int64_t n = write_at(descriptor_, static_cast<const char*>(data) + done, bytes - done, begin + done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    done += size_t(n);
  }
  if (!room || done < bytes) {
    ++failed_writes_;
    return -1;
  }
  end_ = begin + bytes;
  return int64_t(begin);
}

void FlashFile::read(void* out, size_t bytes, uint64_t offset) const {
  const auto begun = std::chrono::steady_clock::now();
  size_t done = 0;
  while (done < bytes) {
    const int64_t n = read_at(descriptor_, static_cast<char*>(out) + done, bytes - done, offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw failure("reading KV pages from disk failed");
    if (n == 0) throw std::runtime_error("reading KV pages from disk failed: the file is shorter than it was");
    done += size_t(n);
  }
  const std::chrono::nanoseconds taken = std::chrono::steady_clock::now() - begun;
  recent_read_nanoseconds_ = (recent_read_nanoseconds_ * 15 + uint64_t(taken.count())) / 16;
  bytes_read_ += bytes;
  ++reads_;
}

void FlashFile::expect([[maybe_unused]] uint64_t offset, [[maybe_unused]] size_t bytes) const {
#if defined(__linux__)
  posix_fadvise(descriptor_, off_t(offset), off_t(bytes), POSIX_FADV_WILLNEED);
#endif
}

}  // namespace satchel
