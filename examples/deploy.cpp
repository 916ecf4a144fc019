// Runs a model that deploy.py compiled: no Python, no model code.
//
//   torch=$(python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent)')
//   flags="-L$torch/lib -Wl,-rpath,$torch/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl"
//   g++ -std=c++20 -O2 -I$torch/include examples/deploy.cpp -o deploy $flags
//   ./deploy runs/deploy 8
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: deploy FOLDER [BATCH [SIZE]]\n");
    return 2;
  }
  const std::string folder = argv[1];
  const int64_t batch = argc > 2 ? std::atoll(argv[2]) : 1, size = argc > 3 ? std::atoll(argv[3]) : 224;
  // pyvit: its operators, before the model that calls them.
  if (!dlopen((folder + "/libpyvit_ops.so").c_str(), RTLD_NOW | RTLD_GLOBAL)) {
    std::fprintf(stderr, "deploy: %s\n", dlerror());
    return 1;
  }
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");
  const at::Tensor images = at::full({batch, 3, size, size}, 0.5);
  at::Tensor logits;  // (batch, classes)
  for (int i = 0; i < 3; ++i) {
    const auto began = std::chrono::steady_clock::now();
    logits = model.run({images})[0];
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - began;
    std::printf("%.1f ms\n", spent.count());
  }
  std::printf("likeliest class of the first image: %lld\n", static_cast<long long>(logits[0].argmax().item<int64_t>()));
}
