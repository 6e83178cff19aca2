// A decoder layer, or its MLP, in one call: threads pass from stage to stage together, so that
// little time goes by between the reading of one weight and of the next.
#include <algorithm>
#include <vector>

#include "attention_plan.h"
#include "ops.h"
#include "threads.h"

namespace specdiff::cpu {
namespace {

// What is between the stages; it stays for the next call of the same thread.
struct Memory {
  std::vector<float> normed, qkv, query, mixed, stream, inner;
  AttentionMemory attention;

  // Lets go of what a long prompt took.
  void trim() {
    for (std::vector<float>* part : {&normed, &qkv, &query, &mixed, &stream, &inner}) {
      if (part->size() > kKept) std::vector<float>().swap(*part);
    }
  }

  static constexpr size_t kKept = size_t(1) << 22;  // floats
};

float* room(std::vector<float>& memory, int64_t size) {
  if (int64_t(memory.size()) < size) memory.resize(size);
  return memory.data();
}

Product product_of(const Rows& x, int64_t m, int64_t k, const Weight& weight, const Rows& out) {
  Product product = {};
  product.x = x;
  product.m = m;
  product.k = k;
  product.weight = weight;
  product.out = out;
  return product;
}

// All outputs of some products, a few packs at a time.
template <int N>
void multiply(Team& team, const Product (&products)[N], int count, int threads) {
  int64_t packs = 0;
  for (int i = 0; i < count; ++i) packs += (products[i].weight.n + kPack - 1) / kPack;
  const int64_t step = std::min<int64_t>(4, std::max<int64_t>(1, packs / (4 * threads))) * kPack;
  int64_t items[N] = {}, total = 0;
  for (int i = 0; i < count; ++i) total += items[i] = (products[i].weight.n + step - 1) / step;
  team.each(total, [&](int64_t item) {
    int i = 0;
    for (; item >= items[i]; ++i) item -= items[i];
    forward().multiply(products[i], item * step, std::min((item + 1) * step, products[i].weight.n));
  });
}

void normalise(Team& team, const Norm& norm, const float* x, int64_t m, int64_t k,
               const Rows& out) {
  team.each(m, [&](int64_t row) { forward().normalise(norm, x + row * k, k, out, row); });
}

// x [m, k], in panels or one row; inner [m, up.n] is in panels; residual [m, down.n] may be null.
void multiply_mlp(Team& team, const Mlp& mlp, const Rows& x, int64_t m, int64_t k,
                  const Rows& inner, const float* residual, float* out, int threads) {
  Product up[1] = {product_of(x, m, k, mlp.up, inner)};
  up[0].gate = mlp.gate;
  up[0].activation = mlp.activation;
  multiply(team, up, 1, threads);
  const int64_t n = mlp.down.n;
  Product down[1] = {product_of(inner, m, mlp.up.n, mlp.down, plain_rows(out, n))};
  down[0].residual = residual;
  down[0].residual_stride = n;
  multiply(team, down, 1, threads);
}

class Layer {
 public:
  Layer(const DecoderLayerParams& p, Memory& memory)
      : p_(p),
        layer_(*p.layer),
        m_(p.batch * p.queries),
        width_((layer_.heads + 2 * layer_.kv_heads) * layer_.size),
        normed_(in_panels(room(memory.normed, panels_size(m_, layer_.hidden)), m_, layer_.hidden)),
        qkv_(p.before ? room(memory.qkv, m_ * width_) : nullptr),
        query_(p.query ? p.query : room(memory.query, m_ * layer_.heads * layer_.size)) {
    if (!p.after) return;
    const int64_t mixed = layer_.heads * layer_.size;
    mixed_ = in_panels(room(memory.mixed, panels_size(m_, mixed)), m_, mixed);
    inner_ = in_panels(room(memory.inner, panels_size(m_, layer_.inner)), m_, layer_.inner);
    stream_ = room(memory.stream, m_ * layer_.hidden);
    const int64_t row = p.queries * mixed;
    attention_ = {query_,        p.batch, p.queries,      layer_.heads, layer_.kv_heads,
                  layer_.size,   row,     mixed,          layer_.size,  p.cache,
                  p.lengths,     p.first, p.parents,      p.limits,     nullptr,
                  layer_.window, 1.0f,    layer_.softcap, nullptr,      p.threads};
    plan_ = memory.attention.plan(attention_, mixed_);
  }

  void run(Team& team) const {
    if (p_.before) before(team);
    if (p_.after) after(team);
  }

 private:
  // Queries, keys and values.
  void before(Team& team) const {
    normalise(team, layer_.attention_norm, p_.x, m_, layer_.hidden, normed_);
    Product products[3];
    int count = 0;
    for (int64_t column = 0; count < 3 && layer_.qkv[count].data; ++count) {
      products[count] = product_of(normed_, m_, layer_.hidden, layer_.qkv[count],
                                   plain_rows(qkv_ + column, width_));
      column += layer_.qkv[count].n;
    }
    multiply(team, products, count, p_.threads);
    team.each(m_, [&](int64_t m) { place(m); });
  }

  // A token's queries, keys and values, turned and where they belong.
  void place(int64_t m) const {
    const int64_t size = layer_.size, b = m / p_.queries, q = m % p_.queries;
    const float* cos = p_.cos ? p_.cos + b * p_.rotary_row + q * p_.rotary : nullptr;
    const float* sin = p_.cos ? p_.sin + b * p_.rotary_row + q * p_.rotary : nullptr;
    const float* from = qkv_ + m * width_;
    for (int64_t head = 0; head < layer_.heads; ++head, from += size) {
      forward().rotate(from, size, cos, sin, p_.rotary / 2, layer_.scale,
                       query_ + (m * layer_.heads + head) * size);
    }
    const KeyValues& c = p_.cache;
    const int64_t slot = p_.slots[m];
    const int64_t row = c.tables ? slot / c.block_size : b;
    const int64_t position = c.tables ? slot % c.block_size : slot;
    float* key = reinterpret_cast<float*>(c.keys) + row * c.key_row + position * c.key_position;
    float* value =
        reinterpret_cast<float*>(c.values) + row * c.value_row + position * c.value_position;
    for (int64_t head = 0; head < layer_.kv_heads; ++head, from += size) {
      forward().rotate(from, size, cos, sin, p_.rotary / 2, 1.0f, key + head * c.key_head);
      std::copy_n(from + layer_.kv_heads * size, size, value + head * c.value_head);
    }
  }

  // Attention and what follows it.
  void after(Team& team) const {
    team.each(plan_.items, [&](int64_t item) { forward().attend(attention_, plan_, item); });
    if (plan_.split) {
      team.each(plan_.merges, [&](int64_t item) { forward().merge(attention_, plan_, item); });
    }
    const int64_t hidden = layer_.hidden;
    Product out[1] = {product_of(mixed_, m_, layer_.heads * layer_.size, layer_.output,
                                 plain_rows(stream_, hidden))};
    out[0].residual = p_.x;
    out[0].residual_stride = hidden;
    multiply(team, out, 1, p_.threads);
    normalise(team, layer_.mlp_norm, stream_, m_, hidden, normed_);
    multiply_mlp(team, layer_.mlp, normed_, m_, hidden, inner_, stream_, p_.out, p_.threads);
  }

  const DecoderLayerParams& p_;
  const DecoderLayer& layer_;
  int64_t m_, width_;
  Rows normed_, mixed_{}, inner_{};
  float *qkv_, *query_, *stream_ = nullptr;
  AttentionParams attention_{};
  AttentionPlan plan_{};
};

Memory& memory_of_thread() {
  thread_local Memory memory;
  return memory;
}

}  // namespace

void decoder_layer(const DecoderLayerParams& p) {
  if (p.batch * p.queries == 0) return;
  const Layer layer(p, memory_of_thread());
  Team team(p.layer->hidden * p.layer->inner <= kElementsPerThread / 4 ? 1 : p.threads);
  team.run([&] { layer.run(team); });
  memory_of_thread().trim();
}

void gated_mlp(const Mlp& mlp, const float* x, int64_t m, int64_t k, float* out, int threads) {
  if (m == 0) return;
  Memory& memory = memory_of_thread();
  const int64_t n = mlp.up.n;
  const Rows laid = m == 1 ? plain_rows(const_cast<float*>(x), 0)
                           : in_panels(room(memory.normed, panels_size(m, k)), m, k);
  const Rows inner = in_panels(room(memory.inner, panels_size(m, n)), m, n);
  Team team(k * n <= kElementsPerThread / 4 ? 1 : threads);
  team.run([&] {
    if (m > 1) team.each(m, [&](int64_t row) { lay_out(x + row * k, k, laid, row); });
    multiply_mlp(team, mlp, laid, m, k, inner, nullptr, out, threads);
  });
  memory.trim();
}

void normalise(const Norm& norm, const float* x, int64_t m, int64_t k, float* out, int threads) {
  parallel_for(m, m * k, threads, [&](int64_t row, int) {
    forward().normalise(norm, x + row * k, k, plain_rows(out, k), row);
  });
}

}  // namespace specdiff::cpu
