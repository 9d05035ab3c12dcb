// A file that archive pages lie in: a temporary one that grows (the cold tier), or a snapshot that is only read.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

namespace satchel {

class FlashFile {
 public:
  // A new file in `folder` that has no name any more once it is open: nothing is left behind, whatever kills us.
  FlashFile(const std::string& folder, uint64_t limit_bytes);
  // An open file, to read: a second descriptor of it, so that its lock is held as long as pages may be read from here.
  explicit FlashFile(int descriptor);
  ~FlashFile();
  FlashFile(const FlashFile&) = delete;
  FlashFile& operator=(const FlashFile&) = delete;

  // Writes at the end; the offset, or -1 when the limit or the disk is full (errors() counts those).
  int64_t append(const void* data, size_t bytes);
  // Throws std::runtime_error when the bytes are not there.
  void read(void* out, size_t bytes, uint64_t offset) const;
  // Tells the system that this range will be read soon; never blocks on the device.
  void expect(uint64_t offset, size_t bytes) const;

  // Whether reads take so long that the device, not the system's memory, must have answered.
  bool slow() const { return recent_read_nanoseconds_ > 20000; }

  uint64_t bytes() const { return end_; }
  uint64_t bytes_read() const { return bytes_read_; }
  uint64_t reads() const { return reads_; }
  uint64_t failed_writes() const { return failed_writes_; }

 private:
  int descriptor_ = -1;
  bool writable_;
  uint64_t limit_bytes_ = 0;
  std::mutex mutex_;
  std::atomic<uint64_t> end_{0};
  mutable std::atomic<uint64_t> bytes_read_{0}, reads_{0};
  mutable std::atomic<uint64_t> recent_read_nanoseconds_{0};  // a moving mean
  std::atomic<uint64_t> failed_writes_{0};
};

}  // namespace satchel
