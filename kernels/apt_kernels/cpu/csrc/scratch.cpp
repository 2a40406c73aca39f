#include "scratch.h"

#include <cstdlib>
#include <new>

namespace apt {

Scratch::~Scratch() { std::free(memory_); }

void* Scratch::get(int64_t bytes) {
  if (bytes > size_) {
    std::free(memory_);
    size_ = (bytes + bytes / 4 + 63) / 64 * 64;
    memory_ = std::aligned_alloc(64, static_cast<size_t>(size_));
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  return memory_;
}

}  // namespace apt
