// Memory that a thread keeps from one call to the next.
#pragma once

#include <cstdint>

namespace apt {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // At least this much, aligned to 64 bytes; what was in it before is lost.
  void* get(int64_t bytes);

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace apt
