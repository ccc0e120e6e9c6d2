// Runs products and attention from standard input with every variant of the kernel that this machine has, for machines without Python.
//
// Input, again and again: 9 int64 (rows, outputs, width, bits, group, half scales, what follows, has zeros, has bias), then x, codes,
// scales, zeros, bias; or 9 int64 (-1, rows, heads, heads of keys and values, width, capacity, type of the cache, rows of the first
// call, 0), then qkv, cos, sin. Output for each variant: its name in 16 bytes, and y.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" const char* vlmdeploy_variant(int);
extern "C" int vlmdeploy_product(const char*, int64_t, int64_t, int64_t, int, int, int, int, const float*, const uint8_t*,
                                 const void*, const uint8_t*, const float*, float*);

extern "C" int vlmdeploy_attention(const char*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, int, const float*, const float*,
                                   const float*, void*, void*, uint16_t*, uint16_t*, float*);

static void put(const char* name, const std::vector<float>& y) {
  char padded[16] = {};
  strncpy(padded, name, 15);
  fwrite(padded, 1, 16, stdout);
  fwrite(y.data(), 4, y.size(), stdout);
}

static std::vector<char> read(int64_t bytes) {
  std::vector<char> out(bytes);
  if (fread(out.data(), 1, bytes, stdin) != size_t(bytes)) out.clear();
  return out;
}

static void attend(const int64_t* s) {
  const int64_t rows = s[1], heads = s[2], kv_heads = s[3], width = s[4], capacity = s[5], row_width = (heads + 2 * kv_heads) * width;
  const auto qkv = read(4 * rows * row_width), cos = read(2 * capacity * width), sin = read(2 * capacity * width);
  std::vector<float> y(rows * heads * width);
  for (int i = 0; const char* name = vlmdeploy_variant(i); i++) {
    std::vector<float> keys(kv_heads * capacity * width), values(keys);
    std::vector<uint16_t> key_scales(keys.size()), value_scales(keys.size());
    for (int call = 0; call < 2; call++) {
      const int64_t first = call ? s[7] : 0, last = call ? rows : s[7];
      vlmdeploy_attention(name, last - first, heads, kv_heads, width, capacity, first, 1 / std::sqrt(float(width)), int(s[6]),
                          (const float*)qkv.data() + first * row_width, (const float*)cos.data(), (const float*)sin.data(), keys.data(),
                          values.data(), key_scales.data(), value_scales.data(), y.data() + first * heads * width);
    }
    put(name, y);
  }
}

int main() {
  int64_t s[9];
  while (fread(s, 8, 9, stdin) == 9) {
    if (s[0] == -1) {
      attend(s);
      continue;
    }
    const int64_t rows = s[0], outputs = s[1], width = s[2], bits = s[3], group = s[4], groups = width / group;
    const auto x = read(4 * rows * width), codes = read(outputs * width * bits / 8), scales = read((s[5] ? 2 : 4) * outputs * groups);
    const auto zeros = read(s[7] ? outputs * ((groups * bits + 7) / 8) : 0), bias = read(s[8] ? 4 * outputs : 0);
    std::vector<float> y(rows * (s[6] == 1 ? outputs / 2 : outputs));
    for (int i = 0; const char* name = vlmdeploy_variant(i); i++) {
      if (!vlmdeploy_product(name, rows, outputs, width, bits, group, s[5], s[6], (const float*)x.data(), (const uint8_t*)codes.data(),
                             scales.data(), s[7] ? (const uint8_t*)zeros.data() : nullptr, s[8] ? (const float*)bias.data() : nullptr,
                             y.data()))
        return 1;
      put(name, y);
    }
  }
}
