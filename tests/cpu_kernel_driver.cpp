// Runs products from standard input with every variant of the kernel that this machine has, for machines without Python.
//
// Input, again and again: 9 int64 (rows, outputs, width, bits, group, half scales, what follows, has zeros, has bias), then x, codes,
// scales, zeros, bias. Output for each variant: its name in 16 bytes, and y.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" const char* vlmdeploy_variant(int);
extern "C" int vlmdeploy_product(const char*, int64_t, int64_t, int64_t, int, int, int, int, const float*, const uint8_t*,
                                 const void*, const uint8_t*, const float*, float*);

static std::vector<char> read(int64_t bytes) {
  std::vector<char> out(bytes);
  if (fread(out.data(), 1, bytes, stdin) != size_t(bytes)) out.clear();
  return out;
}

int main() {
  int64_t s[9];
  while (fread(s, 8, 9, stdin) == 9) {
    const int64_t rows = s[0], outputs = s[1], width = s[2], bits = s[3], group = s[4], groups = width / group;
    const auto x = read(4 * rows * width), codes = read(outputs * width * bits / 8), scales = read((s[5] ? 2 : 4) * outputs * groups);
    const auto zeros = read(s[7] ? outputs * ((groups * bits + 7) / 8) : 0), bias = read(s[8] ? 4 * outputs : 0);
    std::vector<float> y(rows * (s[6] == 1 ? outputs / 2 : outputs));
    for (int i = 0; const char* name = vlmdeploy_variant(i); i++) {
      if (!vlmdeploy_product(name, rows, outputs, width, bits, group, s[5], s[6], (const float*)x.data(), (const uint8_t*)codes.data(),
                             scales.data(), s[7] ? (const uint8_t*)zeros.data() : nullptr, s[8] ? (const float*)bias.data() : nullptr,
                             y.data()))
        return 1;
      char padded[16] = {};
      strncpy(padded, name, 15);
      fwrite(padded, 1, 16, stdout);
      fwrite(y.data(), 4, y.size(), stdout);
    }
  }
}
