// llama.cpp for vs_llamacpp.py: one task per line of stdin, one line of numbers per task on stdout.
//
// llamacpp_worker DECODER ENCODER THREADS CONTEXT FLASH(0|1); the first line is the seconds of loading both.
// Text prompts have the ids 3, 4, 5, ... ; a picture is a file of RGB bytes of the encoder's size.
//   read N            seconds of a text prompt of N tokens
//   picture FILE      seconds of the encoder, of the picture's rows in the decoder, rows
//   first FILE N      seconds to the first token of picture and question (17 tokens), then N tokens more are decoded
//   decode DEPTH N    seconds per token of N tokens behind DEPTH others
//   features FILE OUT writes the picture's rows (float32) to OUT
//   logits N OUT      writes the logits behind a text prompt of N tokens, read at once, then token by token
//   memory            anonymous and mapped KiB, and most resident ones
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "llama.h"
#include "mtmd-helper.h"
#include "mtmd.h"

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void check(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(what);
}

void log_errors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

class Worker {
 public:
  Worker(const char* decoder, const char* encoder, int threads, int context, bool flash) {
    auto model_options = llama_model_default_params();
    model_ = llama_model_load_from_file(decoder, model_options);
    check(model_, "the decoder did not load");
    options_ = llama_context_default_params();
    options_.n_ctx = context;
    options_.n_batch = options_.n_ubatch = 512;
    options_.n_threads = options_.n_threads_batch = threads;
    options_.flash_attn_type = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    shallow_ = llama_init_from_model(model_, options_);
    auto image_options = mtmd_context_params_default();
    image_options.use_gpu = image_options.print_timings = image_options.warmup = false;
    image_options.n_threads = threads;
    image_ = mtmd_init_from_file(encoder, model_, image_options);
    check(shallow_ && image_, "no context");
    vocab_size_ = llama_vocab_n_tokens(llama_model_get_vocab(model_));
  }

  void run(const std::string& line) {
    std::istringstream words(line);
    std::string task, file, out;
    int count = 0, depth = 0;
    words >> task;
    if (task == "read") {
      words >> count;
      llama_memory_clear(llama_get_memory(shallow_), true);
      std::cout << read(shallow_, count, 512);
    } else if (task == "picture") {
      words >> file;
      const Picture found = read_picture(file, "");
      std::cout << found.encoder_s << ' ' << found.rows_s << ' ' << found.rows;
    } else if (task == "first") {
      words >> file >> count;
      const double start = now();
      read_picture(file, " Question: What is in the picture? Describe it in detail. Answer:");
      best(shallow_);
      std::cout << now() - start;
      decode(shallow_, count);
    } else if (task == "decode") {
      words >> depth >> count;
      std::cout << decode_behind(depth, count);
    } else if (task == "features") {
      words >> file >> out;
      const Picture found = read_picture(file, "");
      write(out, found.features.data(), found.features.size(), false);
    } else if (task == "logits") {
      words >> count >> out;
      for (const int batch : {512, 1}) {
        llama_memory_clear(llama_get_memory(shallow_), true);
        read(shallow_, count, batch);
        write(out, llama_get_logits_ith(shallow_, -1), vocab_size_, batch == 1);
      }
    } else if (task == "memory") {
      print_memory();
    } else {
      throw std::runtime_error("unknown task " + task);
    }
    std::cout << std::endl;
  }

 private:
  struct Picture {
    double encoder_s = 0, rows_s = 0;
    size_t rows = 0;
    std::vector<float> features;
  };

  llama_token best(llama_context* context) {
    const float* logits = llama_get_logits_ith(context, -1);
    return llama_token(std::max_element(logits, logits + vocab_size_) - logits);
  }

  double decode(llama_context* context, int count) {
    llama_token token = best(context);
    const double start = now();
    for (int i = 0; i < count; i++) {
      check(!llama_decode(context, llama_batch_get_one(&token, 1)), "a token did not decode");
      token = best(context);
    }
    return (now() - start) / std::max(count, 1);
  }

  // The prompt stays in the context of its depth; the tokens behind it are taken out again.
  double decode_behind(int depth, int count) {
    if (depth < 1024) {
      llama_memory_clear(llama_get_memory(shallow_), true);
      read(shallow_, std::max(depth, 1), 512);
      return decode(shallow_, count);
    }
    if (!deep_) deep_ = llama_init_from_model(model_, options_);
    check(deep_, "no context");
    if (deep_tokens_ != depth) {
      llama_memory_clear(llama_get_memory(deep_), true);
      read(deep_, depth, 512);
      deep_tokens_ = depth;
    }
    llama_memory_seq_rm(llama_get_memory(deep_), 0, depth - 1, -1);
    llama_token last = 3 + (depth - 1) % (vocab_size_ - 3);
    check(!llama_decode(deep_, llama_batch_get_one(&last, 1)), "a token did not decode");
    return decode(deep_, count);
  }

  double read(llama_context* context, int count, int batch) {
    std::vector<llama_token> tokens(count);
    for (int i = 0; i < count; i++) tokens[i] = 3 + i % (vocab_size_ - 3);
    const double start = now();
    for (int first = 0; first < count; first += batch)
      check(!llama_decode(context, llama_batch_get_one(tokens.data() + first, std::min(batch, count - first))), "no prompt");
    llama_synchronize(context);
    return now() - start;
  }

  // The picture, then the text if there is one.
  Picture read_picture(const std::string& file, const std::string& text) {
    std::ifstream stream(file, std::ios::binary);
    const std::vector<unsigned char> pixels((std::istreambuf_iterator<char>(stream)), {});
    uint32_t side = 1;
    while (side * side * 3 < pixels.size()) side++;
    check(!pixels.empty() && side * side * 3 == pixels.size(), "not a square picture");
    llama_memory_clear(llama_get_memory(shallow_), true);
    mtmd_bitmap* bitmap = mtmd_bitmap_init(side, side, pixels.data());
    mtmd_input_chunks* chunks = mtmd_input_chunks_init();
    const std::string prompt = mtmd_default_marker() + text;
    const mtmd_input_text input{prompt.data(), prompt.size(), true, true};
    const mtmd_bitmap* bitmaps[1] = {bitmap};
    check(!mtmd_tokenize(image_, chunks, &input, bitmaps, 1), "no prompt");
    Picture found;
    llama_pos past = 0;
    const size_t parts = mtmd_input_chunks_size(chunks), width = llama_model_n_embd(model_);
    for (size_t i = 0; i < parts; i++) {
      const mtmd_input_chunk* chunk = mtmd_input_chunks_get(chunks, i);
      if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_TEXT) {
        check(!mtmd_helper_eval_chunk_single(image_, shallow_, chunk, past, 0, 512, i + 1 == parts, &past), "no text");
        llama_synchronize(shallow_);
        continue;
      }
      double start = now();
      check(!mtmd_encode_chunk(image_, chunk), "no features");
      found.encoder_s = now() - start;
      found.rows = mtmd_input_chunk_get_n_tokens(chunk);
      const float* rows = mtmd_get_output_embd(image_);
      found.features.assign(rows, rows + found.rows * width);
      start = now();
      check(!mtmd_helper_decode_image_chunk(image_, shallow_, chunk, found.features.data(), past, 0, 512, &past, nullptr, nullptr),
            "no picture");
      llama_synchronize(shallow_);
      found.rows_s = now() - start;
    }
    mtmd_input_chunks_free(chunks);
    mtmd_bitmap_free(bitmap);
    return found;
  }

  static void write(const std::string& path, const float* values, size_t count, bool append) {
    std::ofstream stream(path, append ? std::ios::binary | std::ios::app : std::ios::binary);
    stream.write((const char*)values, count * sizeof(float));
  }

  static void print_memory() {
    for (const std::string key : {"RssAnon:", "RssFile:", "VmHWM:"}) {
      std::ifstream status("/proc/self/status");
      for (std::string line; std::getline(status, line);)
        if (!line.compare(0, key.size(), key)) std::cout << atol(line.c_str() + key.size()) << ' ';
    }
  }

  llama_model* model_;
  llama_context_params options_;
  llama_context *shallow_, *deep_ = nullptr;
  int deep_tokens_ = 0;
  mtmd_context* image_;
  int vocab_size_;
};

}  // namespace

int main(int count, char** words) {
  if (count != 6) return 2;
  llama_log_set(log_errors, nullptr);
  mtmd_helper_log_set(log_errors, nullptr);
  ggml_backend_load_all();
  llama_backend_init();
  try {
    const double start = now();
    Worker worker(words[1], words[2], atoi(words[3]), atoi(words[4]), atoi(words[5]) != 0);
    std::cout << now() - start << std::endl;
    for (std::string line; std::getline(std::cin, line);) worker.run(line);
  } catch (const std::exception& error) {
    std::cerr << "llamacpp_worker: " << error.what() << '\n';
    return 1;
  }
}
