import { defaultClientConditions, defineConfig } from "vite";

export default defineConfig({
  base: "./", // it is served from wherever it is put
  worker: { format: "es" },
  resolve: {
    // onnxruntime-web's own files stay apart: its threads load them by address.
    conditions: ["onnxruntime-web-use-extern-wasm", ...defaultClientConditions],
  },
  build: { target: "es2022", chunkSizeWarningLimit: 2000 },
});
