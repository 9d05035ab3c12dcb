// What a conversation remembers for each layer and KV head: hot pages, and the archive of what left them.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "archive.h"
#include "page_pool.h"
#include "parallel.h"
#include "variant.h"

namespace satchel {

// KV heads that see the first and the most recent tokens only, and hold no more however long the text is.
struct StreamingHeads {
  std::vector<uint8_t> heads;  // [layers, kv_heads] 1: it streams. Empty: none does
  int sinks = 0;               // first tokens that it always sees: whole pages
  int window = 0;              // most recent tokens that it sees, the query's own included
  bool compensated = false;    // a query sees what lies between these as one pair, their mean (RazorAttention)
};

struct CacheShape {
  int layers, heads, kv_heads, head_size;
  Storage storage;
  int threads;           // how many ways to split a single token's work
  int observed_queries;  // the last so many queries of each chunk are kept for the scorers (0: none)
  size_t limit_bytes;    // of pages; 0: no limit
  std::shared_ptr<const ArchiveSettings> archive;  // null: what leaves the hot tier is forgotten
  std::vector<int> windows;  // tokens that each layer sees, the query's own included; 0: everything. Empty: no windows
  bool retention = false;  // each hot pair has a score, which the graph gives with it
  StreamingHeads streaming;
  int window(int layer) const { return windows.empty() ? 0 : windows[layer]; }
  bool streams(int layer, int kv_head) const {
    return !streaming.heads.empty() && streaming.heads[size_t(layer) * kv_heads + kv_head];
  }
  bool any_streams(int layer) const;
  bool all_stream(int layer) const;
  int window(int layer, int kv_head) const { return streams(layer, kv_head) ? streaming.window : window(layer); }
  bool forgets(int layer) const { return window(layer) || any_streams(layer); }  // of some head what no query sees
  // First pages of a head that are never forgotten.
  int sink_pages(int layer, int kv_head) const { return streams(layer, kv_head) ? streaming.sinks / kPageTokens : 0; }
};

// A layer or head with a window holds so many tokens more than the next query sees: a conversation can be cut back by as many.
constexpr int kWindowSlack = 64;

struct AttentionSettings {
  int layer;
  float scale, softcap;
  int window;
  int rope_dims;
  float rope_attention_factor;
};

class KVCache {
 public:
  explicit KVCache(const CacheShape& shape);
  std::unique_ptr<KVCache> fork() const;  // shares pages until one of the two writes

  // Appends keys and values of a chunk (before RoPE) to a layer and attends to everything that the layer holds.
  // queries [tokens, heads, D], keys and values [tokens, kv_heads, D], positions [tokens] ascending,
  // frequencies [rope_dims / 2], out [tokens, heads, D]; retention [tokens, kv_heads], which a cache without room for
  // scores passes over.
  void attend(const AttentionSettings&, const float* queries, const float* keys, const float* values,
              const int64_t* positions, int tokens, const float* frequencies, float* out, const Parallel&,
              const float* retention = nullptr);

  // What the last graph run appended is part of the conversation. Layers with a window and streaming heads forget whole
  // pages that no query at the next position sees, nor one at up to kWindowSlack positions before it.
  void commit();
  void rollback();  // it is not: forget it (a run that was cancelled or failed half-way)
  // And neither is anything at this position or later. Throws std::runtime_error, before anything changes, when a layer
  // or head with a window has forgotten what a query at `position` would see.
  void forget_from(int position);
  // Keeps what layers and heads with a window hold now, so that forget_from() can come back here however much is read meanwhile.
  // Forgets first what a run has left half-done. A fork has no mark.
  void mark();
  void release_mark() { mark_.reset(); }

  // From now on each query at position `end` or later leaves its mark on the pairs at positions first .. end - 1, all of
  // which must be and stay hot: the largest share of its attention, over all that it sees, that such a pair has had, for each KV
  // head over the query heads that read it. Of layers that see everything; a fork watches nothing. first == end: no more.
  void watch(int first, int end);
  // The logarithms of these shares [end - first]; -inf where no query has come.
  std::vector<float> watched(int layer, int kv_head) const;
  // The lengths of the values of a head's hot pairs at positions first .. end - 1.
  std::vector<float> value_norms(int layer, int kv_head, int first, int end) const;

  // Stores all pairs before `until` (a multiple of the archive's step) in the archive: of all heads that see everything,
  // or, when it fails, of none. Layers with a window and streaming heads archive nothing: what has left it is never read
  // again.
  // block_scores [archived layers, kv_heads, blocks] ranks the blocks of each cell, for codecs of mixed precision; may be
  // null.
  void archive_until(int until, const float* block_scores, const Parallel&);
  int archived_until() const { return archive_ ? archive_->end() : 0; }
  void drop_archived();  // forgets in the hot tier what the archive has
  const Archive* archive() const { return archive_.get(); }
  int archived_layers() const { return int(layer_of_archive_.size()); }
  int archive_index(int layer) const { return archive_index_.at(layer); }  // the layer's place in it, or -1
  // A head's place among the layer's archived ones, or -1, and how many these are.
  int archive_row(int layer, int kv_head) const {
    return archive_index_.at(layer) < 0 ? -1 : archive_rows_.at(size_t(layer) * shape_.kv_heads + kv_head);
  }
  int archived_heads(int layer) const;

  // Keeps the tokens kept[kv_head][0..count) (ascending indices) of a layer and forgets the others.
  void retain(int layer, int kv_head, const int32_t* kept, int count);
  // The same for all heads of a layer, as many of each as it says: when memory for copies runs out, none has changed.
  struct Kept {
    const int32_t* tokens;
    int count;
  };
  void retain_layer(int layer, const std::vector<Kept>& heads);
  // Gives the tokens (ascending indices) of a head other keys (after RoPE) and values, [count, D]: what was forgotten may
  // have been merged into them. None changes when memory for copies runs out.
  void overwrite(int layer, int kv_head, const int32_t* tokens, int count, const float* keys, const float* values);

  int tokens(int layer, int kv_head) const;
  void positions(int layer, int kv_head, int32_t* out) const;
  void retention(int layer, int kv_head, float* out) const;  // [tokens], of a cache that has it
  // Copies: keys (before RoPE, or after it when `rotated`), values [tokens, D], positions [tokens]
  void read(int layer, int kv_head, bool rotated, float* keys, float* values, int32_t* positions) const;
  // The observed queries before RoPE [n, heads, D] and their positions [n]
  const std::vector<float>& observed(int layer) const { return layers_.at(layer).observed; }
  const std::vector<int32_t>& observed_positions(int layer) const { return layers_.at(layer).observed_positions; }

  // Of the layer's RoPE, as its last run gave them: layers may turn differently, or not at all.
  const std::vector<float>& frequencies(int layer) const { return layers_.at(layer).frequencies; }

  const CacheShape& shape() const { return shape_; }
  const PagePool& pool() const { return *pool_; }
  void trim() { pool_->trim(); }
  size_t bytes() const;  // of the pages this cache refers to, shared ones and those of a mark included

 private:
  // What a streaming head has forgotten, for its mean.
  struct Dropped {
    explicit Dropped(int head_size) : sums(size_t(2) * head_size) {}
    void add(const float* keys, const float* values, int count, int head_size);
    int tokens = 0;
    std::vector<double> sums;  // [2, D] of keys after RoPE, and of values
  };
  struct Head {
    std::vector<std::shared_ptr<Page>> pages;
    int tokens = 0, committed = 0;
    std::shared_ptr<const Dropped> dropped;  // null: nothing, or it is not compensated for
  };
  struct Layer {
    std::vector<Head> heads;
    std::vector<float> frequencies;  // of its RoPE, for taking keys back to before it
    float attention_factor = 1;
    std::vector<float> observed;
    std::vector<int32_t> observed_positions;
    std::vector<float> committed_observed;  // what they were before this run, while there is one
    std::vector<int32_t> committed_positions;
    bool observing = false;  // a run that is neither committed nor rolled back has added to them
    int trimmed_until = 0;   // positions below this have left its window or its streaming heads', and were forgotten
  };
  struct Mark {
    struct Held {
      std::vector<Head> heads;
      int trimmed_until;
    };
    int position = 0;  // of the token that would have come next
    std::vector<Held> layers;  // those that forget, in order; of heads that see everything it holds nothing
  };

  struct Watch {
    int first, end;
    std::vector<std::vector<float>> best;  // [layers][kv_heads * (end - first)]; empty: the layer has a window
  };

  friend class CacheState;
  KVCache(const KVCache& other);
  void drop_unseen();
  void drop_pages(int layer, int kv_head, int pages);
  void expect_window(int position, int layer, int trimmed_until) const;
  void archive_layer(int index, int until, const float* block_scores, const Parallel&);
  std::vector<float> observed_energy(const Layer&, int kv_head) const;
  void return_to_hot(int position);
  void expect_room(int tokens) const;
  int prepare_retain(Head&, const int32_t* kept, int count);
  Page& writable(Head&, int page);
  void truncate(Head&, int tokens);
  void append(Head&, const float* keys, const float* values, int64_t stride, const int32_t* positions, int tokens,
              const float* rope, int half, const float* retention);
  static int32_t position_of(const Head&, int token);
  static int first_at(const Head&, int position);
  void read_range(const Head&, int first, int count, float* keys, float* values, int32_t* positions) const;
  void prepare_rope(const AttentionSettings&, const int64_t* positions, int tokens, const float* frequencies);
  void observe(Layer&, const float* queries, int tokens);
  std::vector<int32_t> archived_positions(const Head&) const;
  int splits_for(const Layer&, int rows, bool recall) const;
  AttentionTask task_of(const AttentionSettings&, int kv, int split, int first_row, int last_row, int rows);
  struct HotKeys;
  HotKeys hot_keys(const AttentionSettings&, int kv, bool recall) const;
  void attend_head(const AttentionSettings&, int kv, const HotKeys&, int split, int splits, AttentionTask&) const;
  void attend_dropped(const Head&, int sinks, const AttentionTask&) const;
  void copy_rows(const AttentionTask&, int kv, int first_row, float* out) const;
  void attend_hot(const AttentionSettings&, int tokens, int splits, bool recall, float* out, const Parallel&);
  void prepare_archive_rope(const AttentionSettings&, int last);
  struct Choice {  // of tokens first .. last of a chunk, for one KV head and its row in the archive
    int kv_head, row, first, last;
    std::vector<int32_t> blocks;
  };
  bool choice_is_due(int index);
  std::vector<Choice> choices_of(int layer, int tokens) const;
  void choose_blocks(const AttentionSettings&, int tokens, int splits, std::vector<Choice>&, const Parallel&);
  void attend_recalled(const AttentionSettings&, int tokens, int splits, const std::vector<Choice>&, float* out,
                       const Parallel&);
  void merge(int splits, int tokens, float* out) const;
  void note_watched(const AttentionSettings&, int tokens, int splits, const Parallel&);

  CacheShape shape_;
  std::shared_ptr<PagePool> pool_;
  std::vector<Layer> layers_;
  std::unique_ptr<Archive> archive_;
  std::vector<int> archive_index_, layer_of_archive_;  // of each layer, and of each place in the archive
  std::vector<int> archive_rows_;  // [layers, kv_heads]
  std::unique_ptr<Mark> mark_;
  std::unique_ptr<Watch> watch_;

  // Working memory of one call, kept from call to call.
  struct Workspace {
    std::vector<float> rope;            // [tokens, rope_dims]: cosines, then sines
    std::vector<int32_t> positions;     // [tokens]
    std::vector<float> rope_frequencies;
    float rope_factor = 0;
    std::vector<float> queries;         // [kv_heads, tokens * group, D], after RoPE and scale
    std::vector<int32_t> row_positions;  // [tokens * group]
    std::vector<float> out, maxima, weights;  // of every task
    RopeTable table;                    // for archived blocks
    std::vector<float> page_ropes;      // [digest pages, rope_dims] as seen from
    int page_ropes_last = -1;           // this position, with these
    float page_ropes_factor = 0;
    std::vector<float> page_ropes_frequencies;
  };
  Workspace work_;
};

// Caches are named by number in the graph: a closed one is an error there, never a dangling pointer.
int64_t register_cache(std::shared_ptr<KVCache> cache);
void unregister_cache(int64_t handle);
std::shared_ptr<KVCache> find_cache(int64_t handle);  // throws std::invalid_argument

}  // namespace satchel
