#include "attention.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>
#include <vector>

#include "attention_products.h"
#include "scratch.h"
#include "thread_pool.h"
#include "vec.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kSplit = 256;      // keys with one online softmax
constexpr int64_t kTargetRows = 64;  // query rows (queries x heads of a group) that share a packed tile
constexpr int64_t kTasksPerThread = 8;  // so many at least, if there are as many splits: then none waits long for the last
constexpr float kNone = -std::numeric_limits<float>::infinity();

thread_local Scratch work_scratch;     // of the task a thread is in
thread_local Scratch partial_scratch;  // of the call a thread has made

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Some consecutive queries of one sequence, for every kv head: over all splits, or over some of them.
struct Item {
  int64_t seq;
  int64_t first_query, num_queries;  // within the sequence
  int64_t first_split, end_split;
  // Of several items with the same queries: each leaves the state of every split, and the last to be done folds all.
  int64_t num_siblings;                // with itself; 1 if it has all splits
  int64_t first_partial, num_partials;  // of all siblings
  int64_t partial;                     // of its first split
  int64_t counter;                     // of siblings that are done
};

// Weighted sums of values and their weights, not yet normalized: what folds.
struct State {
  float* sums;     // [rows, head_dim]
  float* weights;  // [rows]
  float* maxima;   // [rows], of the scores

  static int64_t size(int64_t rows, int64_t dim) { return rows * (dim + 2); }
  static State at(float* memory, int64_t rows, int64_t dim) {
    return {memory, memory + rows * dim, memory + rows * (dim + 1)};
  }
  static State at(Arena& arena, int64_t rows, int64_t dim) { return at(arena.take<float>(size(rows, dim)), rows, dim); }
  void clear(int64_t rows, int64_t dim) const {
    std::fill_n(sums, rows * (dim + 1), 0.0f);
    std::fill_n(maxima, rows, kNone);
  }
  void copy(const State& from, int64_t rows, int64_t dim) const {
    std::copy_n(from.sums, size(rows, dim), sums);  // all of it: weights and maxima follow
  }
};

inline float exp_one(float x) { return exp(broadcast(x))[0]; }

void scale_row(float* row, float factor, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kLanes) store(row + d, load(row + d) * factor);
}

// total = total folded with a later split.
void fold(const State& total, const State& split, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (split.maxima[r] == kNone) continue;
    const float highest = std::max(total.maxima[r], split.maxima[r]);
    const float old = exp_one(total.maxima[r] - highest), fresh = exp_one(split.maxima[r] - highest);
    float* sums = total.sums + r * dim;
    for (int64_t d = 0; d < dim; d += kLanes)
      store(sums + d, load(sums + d) * old + load(split.sums + r * dim + d) * fresh);
    total.weights[r] = total.weights[r] * old + split.weights[r] * fresh;
    total.maxima[r] = highest;
  }
}

// The work of one item for one kv head. T: storage of queries; C: of the cache.
template <typename T, typename C>
class HeadTask {
  static constexpr bool kIsScaled = std::is_same_v<C, int8_t>;

 public:
  HeadTask(const PagedAttention& args, const Item& item, int64_t kv_head)
      : a_(args),
        item_(item),
        kv_head_(kv_head),
        group_(args.num_heads / args.num_kv_heads),
        dim_(args.head_dim),
        rows_(item.num_queries * group_),
        arena_(reserve(rows_, dim_)),
        products_(arena_, rows_, dim_),
        scores_(arena_.template take<float>(rows_ * kTile)),
        split_(State::at(arena_, rows_, dim_)),
        whole_(State::at(arena_, rows_, dim_)) {
    const int64_t queries_in_seq = args.cu_seqlens_q[item.seq + 1] - args.cu_seqlens_q[item.seq];
    first_position_ = args.context_lens[item.seq] - queries_in_seq + item.first_query;
    key_begin_ = args.window > first_position_ ? 0 : first_position_ - args.window + 1;
    key_end_ = std::min(first_position_ + item.num_queries, item.end_split * kSplit);
    table_ = args.block_tables + item.seq * args.table_stride;
  }

  int64_t rows() const { return rows_; }
  State whole_state() const { return whole_; }

  // Calls take(split, state) with the result of each split, in order.
  template <typename F>
  void run(F take) {
    for (int64_t r = 0; r < rows_; ++r) products_.set_query(r, static_cast<const T*>(a_.query) + row_offset(r));
    find_keys(std::max(item_.first_split * kSplit, key_begin_ / kTile * kTile));
    prefetch_rows(next_->keys, kTile, 0, dim_);
    prefetch_rows(next_->values, kTile, 0, dim_);
    for (int64_t split = item_.first_split; split < item_.end_split; ++split) {
      split_.clear(rows_, dim_);
      const int64_t end = std::min((split + 1) * kSplit, key_end_);
      for (int64_t tile = split * kSplit; tile < end; tile += kTile)
        if (tile + kTile > key_begin_) run_tile(tile, std::min(tile + kTile, end));
      take(split, split_);
    }
  }

  void write(const State& total) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const float inverse = 1.0f / total.weights[r];
      T* out = static_cast<T*>(a_.out) + row_offset(r);
      for (int64_t d = 0; d < dim_; d += kLanes) store(out + d, load(total.sums + r * dim_ + d) * inverse);
    }
  }

 private:
  static Arena reserve(int64_t rows, int64_t dim) {
    Arena sizes(nullptr);
    Products<T, C>(sizes, rows, dim);
    sizes.take<float>(rows * kTile);
    State::at(sizes, rows, dim);
    State::at(sizes, rows, dim);
    return Arena(work_scratch.get(sizes.size()));
  }

  // Rows are queries x heads of the group.
  int64_t row_offset(int64_t row) const {
    const int64_t token = a_.cu_seqlens_q[item_.seq] + item_.first_query + row / group_;
    return (token * a_.num_heads + kv_head_ * group_ + row % group_) * dim_;
  }

  // Calls f(key, count, block, slot) for keys begin .. end - 1, a block at a time; no other place of the caches is ever
  // read.
  template <typename F>
  void for_each_block(int64_t begin, int64_t end, F f) const {
    int64_t block = begin / a_.block_size, slot = begin % a_.block_size;
    for (int64_t key = begin; key < end; ++block, slot = 0) {
      const int64_t count = std::min(a_.block_size - slot, end - key);
      f(key, count, int64_t{table_[block]}, slot);
      key += count;
    }
  }

  int64_t row_at(int64_t block, int64_t slot) const {
    return block * a_.block_stride + slot * a_.slot_stride + kv_head_ * a_.head_stride;
  }
  int64_t scale_at(int64_t block, int64_t slot) const {
    return block * a_.scale_block_stride + slot * a_.scale_slot_stride + kv_head_ * a_.scale_head_stride;
  }

  // Notes where the next tile is. Blocks lie anywhere, which no processor foresees: they are fetched a tile ahead.
  void find_keys(int64_t tile) {
    const auto keys = static_cast<const C*>(a_.key_cache), values = static_cast<const C*>(a_.value_cache);
    Tile<C>& next = *next_;
    const int64_t begin = std::max(tile, key_begin_), end = std::min(tile + kTile, key_end_);
    if (begin > tile || end < tile + kTile) next.clear();
    next.count = std::max<int64_t>(end - tile, 0);
    for_each_block(begin, end, [&](int64_t key, int64_t count, int64_t block, int64_t slot) {
      int64_t at = row_at(block, slot);
      for (int64_t i = key - tile; i < key - tile + count; ++i, at += a_.slot_stride) {
        next.keys[i] = keys + at;
        next.values[i] = values + at;
      }
      if constexpr (kIsScaled) {
        prefetch_line(a_.key_scales + scale_at(block, slot));
        prefetch_line(a_.value_scales + scale_at(block, slot));
      }
    });
  }

  // Of the current tile: by now they have come.
  void load_scales(int64_t tile, int64_t end) {
    for_each_block(std::max(tile, key_begin_), end, [&](int64_t key, int64_t count, int64_t block, int64_t slot) {
      int64_t at = scale_at(block, slot);
      for (int64_t i = key - tile; i < key - tile + count; ++i, at += a_.scale_slot_stride) {
        tile_->key_scales[i] = a_.key_scales[at];
        tile_->value_scales[i] = a_.value_scales[at];
      }
    });
  }

  void run_tile(int64_t tile, int64_t end) {
    std::swap(tile_, next_);
    if constexpr (kIsScaled) load_scales(tile, end);
    find_keys(tile + kTile);
    products_.score(*tile_, *next_, scores_);
    const bool sees_all = end <= first_position_ + 1 && first_position_ + item_.num_queries - 1 - tile < a_.window &&
                          tile_->count == kTile;
    for (int64_t r = 0; r < rows_; ++r) sees_all ? weigh_row<false>(r, tile, end) : weigh_row<true>(r, tile, end);
    products_.add_values(*tile_, *next_, scores_, split_.sums);
  }

  // Scores of a row -> weights relative to the row's highest score so far, in place.
  template <bool kIsMasked>
  void weigh_row(int64_t r, int64_t tile, int64_t end) {
    float* scores = scores_ + r * kTile;
    if (kIsMasked) mask_row(scores, first_position_ + r / group_, tile, end);
    Vec highest_lanes = load(scores);
    for (int64_t i = kLanes; i < kTile; i += kLanes) highest_lanes = max(highest_lanes, load(scores + i));
    const float here = max(highest_lanes) * a_.scale;
    const float highest = std::max(split_.maxima[r], here);
    if (highest == kNone) {
      std::fill_n(scores, kTile, 0.0f);
      return;
    }
    if (highest > split_.maxima[r]) {
      const float factor = exp_one(split_.maxima[r] - highest);
      scale_row(split_.sums + r * dim_, factor, dim_);
      split_.weights[r] *= factor;
      split_.maxima[r] = highest;
    }
    Vec sums{};
    for (int64_t i = 0; i < kTile; i += kLanes) {
      const Vec weight = exp(load(scores + i) * a_.scale - highest);
      sums += weight;
      store(scores + i, weight);
    }
    split_.weights[r] += sum(sums);
  }

  void mask_row(float* scores, int64_t position, int64_t tile, int64_t end) const {
    const int64_t seen_end = std::min(end, position + 1) - tile;
    const int64_t seen_begin = a_.window > position ? 0 : position + 1 - a_.window - tile;
    for (int64_t i = 0; i < kTile; ++i) scores[i] = i >= seen_begin && i < seen_end ? scores[i] : kNone;
  }

  const PagedAttention& a_;
  const Item& item_;
  const int64_t kv_head_, group_, dim_, rows_;
  int64_t first_position_, key_begin_, key_end_;
  const int32_t* table_;
  Arena arena_;
  Products<T, C> products_;
  Tile<C> tiles_[2];
  Tile<C>*tile_ = &tiles_[0], *next_ = &tiles_[1];
  float* scores_;  // [rows, kTile], then weights
  State split_, whole_;
};

struct Plan {
  std::vector<Item> items;
  int64_t num_partials = 0, num_counters = 0;
};

void plan_sequence(const PagedAttention& a, int64_t seq, int64_t queries_per_item, int64_t splits_per_item, Plan& plan) {
  const int64_t num_queries = a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq];
  const int64_t num_items = divide_up(num_queries, queries_per_item);
  for (int64_t i = num_items - 1; i >= 0; --i) {  // the last see the most keys: longest first
    const int64_t first = i * queries_per_item, count = std::min(queries_per_item, num_queries - first);
    const int64_t position = a.context_lens[seq] - num_queries + first;
    const int64_t first_split = a.window > position ? 0 : (position - a.window + 1) / kSplit;
    const int64_t end_split = divide_up(position + count, kSplit), num_splits = end_split - first_split;
    if (num_items > 1 || num_splits <= splits_per_item) {
      plan.items.push_back({seq, first, count, first_split, end_split, 1, 0, 0, 0, 0});
      continue;
    }
    const int64_t num_siblings = divide_up(num_splits, splits_per_item), first_partial = plan.num_partials;
    for (int64_t split = first_split; split < end_split; split += splits_per_item)
      plan.items.push_back({seq, first, count, split, std::min(split + splits_per_item, end_split), num_siblings,
                            first_partial, num_splits, first_partial + split - first_split, plan.num_counters});
    plan.num_partials += num_splits;
    ++plan.num_counters;
  }
}

// Neighbouring splits in one task are read without a pause; how many has no bearing on results.
int64_t splits_per_item(const PagedAttention& a) {
  int64_t num_splits = 0;
  for (int64_t seq = 0; seq < a.num_seqs; ++seq)
    num_splits += divide_up(std::min<int64_t>(a.context_lens[seq], a.window), kSplit);
  return std::max<int64_t>(num_splits * a.num_kv_heads / (kTasksPerThread * num_threads()), 1);
}

template <typename T, typename C>
void paged_attention_as(const PagedAttention& a) {
  const int64_t group = a.num_heads / a.num_kv_heads, dim = a.head_dim;
  const int64_t queries_per_item = std::max<int64_t>(kTargetRows / group, 1), splits = splits_per_item(a);
  Plan plan;
  for (int64_t seq = 0; seq < a.num_seqs; ++seq) plan_sequence(a, seq, queries_per_item, splits, plan);

  const int64_t partial_size = divide_up(State::size(queries_per_item * group, dim), 16) * 16;
  auto* partials = static_cast<float*>(partial_scratch.get(4 * plan.num_partials * a.num_kv_heads * partial_size));
  std::vector<std::atomic<int64_t>> num_done(static_cast<size_t>(plan.num_counters * a.num_kv_heads));

  parallel_for(static_cast<int64_t>(plan.items.size()) * a.num_kv_heads, [&](int64_t task) {
    const Item& item = plan.items[static_cast<size_t>(task / a.num_kv_heads)];
    const int64_t kv_head = task % a.num_kv_heads;
    HeadTask<T, C> work(a, item, kv_head);
    const int64_t rows = work.rows();
    const State whole = work.whole_state();
    whole.clear(rows, dim);
    if (item.num_siblings == 1) {
      work.run([&](int64_t, const State& split) { fold(whole, split, rows, dim); });
      work.write(whole);
      return;
    }
    const auto partial = [&](int64_t index) {
      return State::at(partials + (index * a.num_kv_heads + kv_head) * partial_size, rows, dim);
    };
    work.run([&](int64_t split, const State& state) {
      partial(item.partial + split - item.first_split).copy(state, rows, dim);
    });
    auto& done = num_done[static_cast<size_t>(item.counter * a.num_kv_heads + kv_head)];
    if (done.fetch_add(1) + 1 < item.num_siblings) return;
    for (int64_t i = 0; i < item.num_partials; ++i) fold(whole, partial(item.first_partial + i), rows, dim);
    work.write(whole);
  });
}

}  // namespace

void paged_attention(const PagedAttention& args) {
  if (args.key_scales != nullptr) {
    args.is_bf16 ? paged_attention_as<Bf16, int8_t>(args) : paged_attention_as<float, int8_t>(args);
  } else {
    args.is_bf16 ? paged_attention_as<Bf16, Bf16>(args) : paged_attention_as<float, float>(args);
  }
}

}  // namespace apt::APT_ISA
