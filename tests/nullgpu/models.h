// The cards that NULLGPU_MODEL names. Memory is the card's total as torch reports it, in MiB: from a printed _CudaDeviceProperties, from
// deviceQuery, or from an OutOfMemoryError ("GPU 0 has a total capacity of 23.64 GiB" is 24207 MiB). It varies by up to 0.3 % with driver and ECC.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct model {
  const char *key, *name;
  int major, minor, processors, mib;  // compute capability, multiprocessors, memory
  int shared, threads, blocks, l2;    // of a multiprocessor: bytes of shared memory, threads, blocks (CUDA programming guide); MiB of L2 cache
};
static const struct model MODELS[] = {
  {"h100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 81089, 233472, 2048, 32, 50},     // total_memory=81089MB; 79.19 GiB
  {"h200", "NVIDIA H200", 9, 0, 132, 143156, 233472, 2048, 32, 60},              // total_memory=143156MB, L2_cache_size=60MB; 139.80 GiB
  {"b200", "NVIDIA B200", 10, 0, 148, 182642, 233472, 2048, 32, 126},            // total_memory=182642MB, L2_cache_size=126MB
  {"a100", "NVIDIA A100-SXM4-40GB", 8, 0, 108, 40339, 167936, 2048, 32, 40},     // deviceQuery: 42298834944 bytes; 39.39 GiB
  {"a100-80", "NVIDIA A100-SXM4-80GB", 8, 0, 108, 81049, 167936, 2048, 32, 40},  // 79.15 GiB; the PCIe card prints 81049 MB
  {"l4", "NVIDIA L4", 8, 9, 58, 22565, 102400, 1536, 24, 48},                    // llama.cpp: 22565 MiB; 22.03 GiB
  {"3090", "NVIDIA GeForce RTX 3090", 8, 6, 82, 24259, 102400, 1536, 16, 6},     // total_memory=24259MB; 23.69 GiB
  {"4090", "NVIDIA GeForce RTX 4090", 8, 9, 128, 24207, 102400, 1536, 24, 72},   // 23.64 GiB, without a display
  {"5090", "NVIDIA GeForce RTX 5090", 12, 0, 170, 32112, 102400, 1536, 24, 96},  // 31.36 GiB
  {"t4", "Tesla T4", 7, 5, 40, 15095, 65536, 1024, 16, 4},                       // total_memory=15095MB; 14.74 GiB
};

// Part `device` of a comma-separated list in the environment, or its last part; empty without one.
static void part(const char *variable, int device, char out[32]) {
  const char *list = getenv(variable);
  if (!list) list = "";
  for (const char *comma; device-- > 0 && (comma = strchr(list, ',')); ) list = comma + 1;
  snprintf(out, 32, "%.*s", (int)strcspn(list, ","), list);
}

static void refuse(const char *variable, const char *value, const char *wanted) {
  fprintf(stderr, "%s=%s: choose %s\n", variable, value, wanted);
  _exit(2);
}

static const struct model *model(int device) {
  enum { COUNT = sizeof MODELS / sizeof *MODELS };
  char key[32], keys[32 + 32 * COUNT] = "";
  part("NULLGPU_MODEL", device, key);
  if (!*key) return MODELS;
  for (int i = 0; i < COUNT; i++) {
    if (!strcmp(key, MODELS[i].key)) return MODELS + i;
    sprintf(keys + strlen(keys), "%s%s", i ? ", " : "one of ", MODELS[i].key);
  }
  refuse("NULLGPU_MODEL", key, keys);
}

// The largest shared memory of a block: all but 1 KiB of a multiprocessor's, and on Turing all.
static int shared_of_block(int device) { return model(device)->shared - (model(device)->major > 7 ? 1024 : 0); }

enum { CONTEXT = 512 << 20 };  // estimate of the memory that a CUDA context and torch's modules take

// Bytes of a card's memory. NULLGPU_MIB overrides the model's.
static long memory(int device) {
  char mib[32], *end;
  part("NULLGPU_MIB", device, mib);
  long n = strtol(mib, &end, 10);
  if (*end || *mib && n << 20 <= CONTEXT) refuse("NULLGPU_MIB", mib, "a number of MiB above 512");
  return (n ? n : model(device)->mib) << 20;
}
