#include "sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "scratch.h"
#include "thread_pool.h"
#include "vec.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kChunk = 256;      // tokens of which the maximum is kept: what lies below a threshold is not looked at
constexpr int64_t kFewTokens = 256;  // so many are sorted
constexpr float kNoWeight = 88.0f;   // beyond it below the maximum, exp gives 0
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

thread_local Scratch row_scratch;

// One bit a lane.
inline uint32_t lane_bits(VecInt mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

inline VecInt lane_numbers() {
  int32_t numbers[kLanes];
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return load_bits<VecInt>(numbers);
}

inline VecInt lanes_below(int64_t count) { return lane_numbers() < static_cast<int32_t>(count); }

// Which tokens are kept: those with more than this logit, and those with just as much whose id is below id_end.
struct Cut {
  float logit;
  int64_t id_end;
};

Cut stricter(Cut a, Cut b) { return a.logit > b.logit || (a.logit == b.logit && a.id_end < b.id_end) ? a : b; }

enum class By { count, weight };

// Of the tokens with at least some logit.
struct Amount {
  int64_t count = 0;
  double measure = 0;  // the count again, or the sum of the weights
};

// One row of logits with what is known about it. Sums run in an order that depends on the row alone: the lanes of a
// chunk in float32, the chunks in double.
template <typename T>
class Row {
 public:
  Row(const T* logits, int64_t size) : logits_(logits), size_(size), num_chunks_((size + kChunk - 1) / kChunk) {
    const int64_t padded = num_chunks_ * kChunk;
    maxima_ = static_cast<float*>(row_scratch.get(4 * (3 * num_chunks_ + 2 * padded)));
    sums_ = maxima_ + num_chunks_;
    spare_ = sums_ + num_chunks_;
    weights_ = spare_ + num_chunks_;
    ids_ = reinterpret_cast<int32_t*>(weights_ + padded);
    scan();
  }

  // A maximum that logits can be compared with: no NaN among them, and neither +inf nor nothing but -inf.
  bool has_finite_max() const { return !has_nan_ && std::isfinite(max_); }

  float max() const { return max_; }

  // The first maximum; NaN is more than everything else, as torch has it.
  int64_t argmax() const {
    if (has_nan_) return first_where([](Vec x) { return x != x; }, 0);
    const int64_t chunk = std::find(maxima_, maxima_ + num_chunks_, max_) - maxima_;
    return first_where([this](Vec x) { return x == max_; }, chunk);
  }

  // The cut that keeps the k best tokens. Needs has_finite_max.
  Cut best(int64_t k) const {
    if (k >= size_) return {-kInfinity, size_};
    // k chunks have at least this maximum, so k tokens have at least this logit.
    std::copy_n(maxima_, num_chunks_, spare_);
    const int64_t rank = std::min(k, num_chunks_) - 1;
    std::nth_element(spare_, spare_ + rank, spare_ + num_chunks_, std::greater<float>());
    return reach<By::count>(static_cast<double>(k), spare_[rank], -FLT_MAX);
  }

  // Gives each token of the cut its weight exp((logit - maximum) / temperature), and others none. Needs has_finite_max.
  void weigh(Cut cut, float temperature) {
    const float scale = std::min(1.0f / temperature, FLT_MAX), top = max_;
    lowest_ = std::max(cut.logit, max_ - kNoWeight * temperature);
    set_weights(cut, [=](Vec x, Vec) { return exp((x - top) * scale); });
  }

  // Takes the weight of the tokens outside of the cut.
  void trim(Cut cut) {
    set_weights(cut, [](Vec, Vec weight) { return weight; });
  }

  double total_weight() const {
    double total = 0;
    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) total += sums_[chunk];
    return total;
  }

  // The cut that keeps the fewest of the weighed tokens, best first, that have this share of all weight.
  Cut nucleus(float share) const {
    const double needed = std::max(share * total_weight(), DBL_MIN);
    const float near = max_ - (max_ - lowest_) / kNoWeight, every_chunk = *std::min_element(maxima_, maxima_ + num_chunks_);
    return reach<By::weight>(needed, std::max(near, every_chunk), lowest_);
  }

  // The token at which the weights, summed up in the order of the ids, exceed this share of their total.
  int64_t invert(double share) const {
    double target = share * total_weight();
    int64_t last = 0;
    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
      if (sums_[chunk] == 0) continue;
      last = chunk;
      if (sums_[chunk] > target) break;
      target -= sums_[chunk];
    }
    return invert_chunk(last, target);
  }

  // The ids of the tokens of a cut, best first; valid until the next call of a function that sorts.
  const int32_t* sorted(Cut cut) const {
    sort(gather(cut.logit, kInfinity));
    return ids_;
  }

  float logit(int64_t id) const { return to_float(logits_[id]); }

 private:
  int64_t chunk_size(int64_t chunk) const { return std::min(size_ - chunk * kChunk, kChunk); }

  // Calls f(logits, id of the first) for each vector of a chunk; lanes beyond the row hold -inf.
  template <typename F>
  void for_each_vec(int64_t chunk, F f) const {
    const int64_t begin = chunk * kChunk, size = chunk_size(chunk);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) f(load(logits_ + begin + i), begin + i);
    if (i < size) {
      const Vec x = load_first(logits_ + begin + i, size - i);
      f(lanes_below(size - i) ? x : broadcast(-kInfinity), begin + i);
    }
  }

  void scan() {
    VecInt nan{};
    max_ = -kInfinity;
    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
      Vec top = broadcast(-kInfinity);
      for_each_vec(chunk, [&](Vec x, int64_t) {
        nan |= x != x;
        top = apt::APT_ISA::max(x, top);  // passes over NaN
      });
      maxima_[chunk] = apt::APT_ISA::max(top);
      max_ = std::max(max_, maxima_[chunk]);
    }
    has_nan_ = lane_bits(nan) != 0;
  }

  template <typename Condition>
  int64_t first_where(Condition holds, int64_t chunk) const {
    int64_t found = size_;
    for (; found == size_ && chunk < num_chunks_; ++chunk)
      for_each_vec(chunk, [&](Vec x, int64_t id) {
        const uint32_t bits = lane_bits(holds(x));
        if (bits != 0 && found == size_) found = id + __builtin_ctz(bits);
      });
    return found;
  }

  // weight(logits, old weights) becomes the weight of the tokens of the cut, 0 that of the others. Chunks wholly below
  // it are left as they are: nothing looks at them any more.
  template <typename F>
  void set_weights(Cut cut, F weight) {
    const Vec threshold = broadcast(cut.logit);
    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
      Vec sum{};
      if (maxima_[chunk] >= cut.logit)
        for_each_vec(chunk, [&](Vec x, int64_t id) {
          const VecInt is_first = lane_numbers() < static_cast<int32_t>(std::clamp<int64_t>(cut.id_end - id, 0, kLanes));
          const VecInt is_kept = (x > threshold) | ((x == threshold) & is_first);
          const Vec value = is_kept ? weight(x, load(weights_ + id)) : Vec{};
          store(weights_ + id, value);
          sum += value;
        });
      sums_[chunk] = apt::APT_ISA::sum(sum);
    }
  }

  template <By by>
  Amount from(float logit) const {
    const Vec threshold = broadcast(logit);
    VecInt counts{};
    Amount amount;
    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
      if (maxima_[chunk] < logit) continue;
      Vec sum{};
      for_each_vec(chunk, [&](Vec x, int64_t id) {
        const VecInt is_in = x >= threshold;
        counts -= is_in;
        if constexpr (by == By::weight) sum += is_in ? load(weights_ + id) : Vec{};
      });
      if constexpr (by == By::weight) amount.measure += apt::APT_ISA::sum(sum);
    }
    for (int i = 0; i < kLanes; ++i) amount.count += counts[i];
    if constexpr (by == By::count) amount.measure = static_cast<double>(amount.count);
    return amount;
  }

  // The cut that keeps the fewest tokens, best first, whose measure reaches `needed`, or all tokens if even those from
  // `lowest` on do not. Starts at a guess. Halves a range of logits until few tokens or equal ones are left in it; these are sorted.
  template <By by>
  Cut reach(double needed, float guess, float lowest) const {
    float high = std::nextafter(max_, kInfinity);  // the tokens from here on do not reach it,
    float low = std::max(guess, lowest);           // those from here on do
    Amount above, reached = from<by>(low);
    for (float width = max_ - low; reached.measure < needed;) {
      if (low == lowest) return {-kInfinity, size_};
      high = low;
      above = reached;
      width = 4 * width + (std::nextafter(max_, kInfinity) - max_);
      low = std::max(max_ - width, lowest);
      reached = from<by>(low);
    }
    while (reached.count - above.count > kFewTokens) {
      const float middle = 0.5f * low + 0.5f * high;
      if (!(low < middle && middle < high)) break;
      const Amount half = from<by>(middle);
      (half.measure < needed ? high : low) = middle;
      (half.measure < needed ? above : reached) = half;
    }
    const int64_t count = gather(low, high);
    sort(count);
    double measure = above.measure;
    int64_t i = 0;
    do measure += by == By::weight ? weights_[ids_[i]] : 1; while (++i < count && measure < needed);
    return {logit(ids_[i - 1]), ids_[i - 1] + 1};
  }

  // Ids of the tokens with low <= logit < high, ascending, into ids_; returns how many.
  int64_t gather(float low, float high) const {
    int64_t count = 0;
    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
      if (maxima_[chunk] < low) continue;
      const int64_t size = chunk_size(chunk);
      for_each_vec(chunk, [&](Vec x, int64_t id) {
        uint32_t bits = lane_bits((x >= low) & (x < high) & lanes_below(chunk * kChunk + size - id));
        for (; bits != 0; bits &= bits - 1) ids_[count++] = static_cast<int32_t>(id + __builtin_ctz(bits));
      });
    }
    return count;
  }

  // The first ids_ by their logits, the best first.
  void sort(int64_t count) const {
    const auto is_better = [this](int32_t a, int32_t b) {
      const float left = logit(a), right = logit(b);
      return left > right || (left == right && a < b);
    };
    if (!std::is_sorted(ids_, ids_ + count, is_better)) std::sort(ids_, ids_ + count, is_better);
  }

  int64_t invert_chunk(int64_t chunk, double target) const {
    int64_t last = chunk * kChunk;
    double sum = 0;
    for (int64_t id = last, end = id + chunk_size(chunk); id < end; ++id) {
      if (weights_[id] == 0) continue;
      last = id;  // it stays the last one if rounding let the target exceed the sum
      sum += weights_[id];
      if (sum > target) break;
    }
    return last;
  }

  const T* logits_;
  int64_t size_, num_chunks_;
  float* maxima_;   // [num_chunks]
  float* sums_;     // [num_chunks], of the weights
  float* spare_;    // [num_chunks]
  float* weights_;  // [size]
  int32_t* ids_;    // [size]
  float max_;       // of all logits but NaN
  float lowest_;    // no logit below it has a weight
  bool has_nan_;
};

template <typename T>
int64_t draw(const Sample& a, int64_t i) {
  Row<T> row(static_cast<const T*>(a.logits) + i * a.size, a.size);
  const float temperature = a.temperature[i];
  if (temperature == 0 || !row.has_finite_max()) return row.argmax();
  Cut cut{-kInfinity, a.size};
  if (a.min_p[i] > 0) cut.logit = static_cast<float>(row.max() + temperature * std::log(static_cast<double>(a.min_p[i])));
  if (a.top_k[i] > 0) cut = stricter(cut, row.best(a.top_k[i]));
  row.weigh(cut, temperature);
  if (a.top_p[i] < 1) row.trim(row.nucleus(a.top_p[i]));
  return row.invert(a.uniform[i]);
}

template <typename T>
void sample_as(const Sample& a) {
  parallel_for(a.rows, [&](int64_t i) { a.token_ids[i] = draw<T>(a, i); });
}

template <typename T>
void argmax_as(const Argmax& a) {
  parallel_for(a.rows, [&](int64_t i) {
    a.token_ids[i] = Row<T>(static_cast<const T*>(a.logits) + i * a.size, a.size).argmax();
  });
}

template <typename T>
void logprobs_of_row(const TopLogprobs& a, int64_t i) {
  Row<T> row(static_cast<const T*>(a.logits) + i * a.size, a.size);
  float* top = a.top + i * a.num_top;
  int64_t* top_ids = a.top_ids + i * a.num_top;
  if (!row.has_finite_max()) {
    a.chosen[i] = kNan;
    std::fill_n(top, a.num_top, kNan);
    for (int64_t rank = 0; rank < a.num_top; ++rank) top_ids[rank] = rank;
    return;
  }
  row.weigh({-kInfinity, a.size}, 1.0f);
  const auto log_sum = static_cast<float>(std::log(row.total_weight()));
  const auto logprob = [&](int64_t id) { return row.logit(id) - row.max() - log_sum; };
  a.chosen[i] = logprob(a.token_ids[i]);
  if (a.num_top == 0) return;
  const int32_t* best = row.sorted(row.best(a.num_top));
  for (int64_t rank = 0; rank < a.num_top; ++rank) {
    top_ids[rank] = best[rank];
    top[rank] = logprob(best[rank]);
  }
}

template <typename T>
void top_logprobs_as(const TopLogprobs& a) {
  parallel_for(a.rows, [&](int64_t i) { logprobs_of_row<T>(a, i); });
}

}  // namespace

void argmax(const Argmax& args) { args.is_bf16 ? argmax_as<Bf16>(args) : argmax_as<float>(args); }

void sample(const Sample& args) { args.is_bf16 ? sample_as<Bf16>(args) : sample_as<float>(args); }

void top_logprobs(const TopLogprobs& args) { args.is_bf16 ? top_logprobs_as<Bf16>(args) : top_logprobs_as<float>(args); }

}  // namespace apt::APT_ISA
