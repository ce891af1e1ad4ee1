import type * as Ort from "onnxruntime-web";
import gpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import gpuWasm from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import cpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import cpuWasm from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

export interface Runtime {
  ort: typeof Ort;
  provider: "webgpu" | "wasm";
  /** For people. */
  where: string;
}

/**
 * onnxruntime-web for the GPU where the browser has one that can run the model, else for its processors. A GPU that
 * does not compute in 16 bits is found out by the first run only, so that it is asked before.
 */
export async function loadRuntime(gpuType: "fp32" | "fp16" | null): Promise<Runtime> {
  const found = gpuType && (await navigator.gpu?.requestAdapter());
  const gpu = found && (gpuType === "fp32" || found.features.has("shader-f16"));
  const ort = (gpu ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm")) as typeof Ort;
  const [mjs, wasm] = gpu ? [gpuGlue, gpuWasm] : [cpuGlue, cpuWasm];
  const here = (url: string) => new URL(url, self.location.href).href;
  ort.env.wasm.wasmPaths = { mjs: here(mjs), wasm: here(wasm) };
  ort.env.logLevel = "error";
  if (gpu) return { ort, provider: "webgpu", where: "WebGPU" };
  // Threads need shared memory, which browsers give to pages that are isolated from others.
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
  ort.env.wasm.numThreads = threads;
  return { ort, provider: "wasm", where: `WASM, ${threads} thread${threads > 1 ? "s" : ""}` };
}
