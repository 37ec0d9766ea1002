// A small, complete client in JavaScript: streams text, sets a deadline, cancels on Ctrl-C.
//
//     npm ci --prefix examples/node
//     node examples/node/client.js "The capital of France is"
//     node examples/node/client.js --chat --address gateway.example:50051 --max-tokens 200 "Tell me of the sea"
//
// The stubs are made from the .proto files when the program starts; nothing is generated ahead.

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));

const USAGE = "usage: node client.js [--address HOST:PORT] [--chat] [--max-tokens N] [--temperature T] [--seed N] PROMPT";

function readArguments() {
  try {
    const { values, positionals } = parseArgs({
      allowPositionals: true,
      options: {
        address: { type: "string", default: "127.0.0.1:50051" },
        chat: { type: "boolean", default: false },
        "max-tokens": { type: "string", default: "64" },
        temperature: { type: "string" }, // 0 = greedy; default: the model's own
        seed: { type: "string" },
        timeout: { type: "string", default: "60" }, // deadline of the whole request, seconds
        key: { type: "string", default: process.env.TANDEM_API_KEY ?? "" },
      },
    });
    if (positionals.length !== 1) throw new Error("one prompt is needed");
    return { options: values, prompt: positionals[0] };
  } catch (error) {
    console.error(`${error.message}\n${USAGE}`);
    process.exit(2);
  }
}
const { options, prompt } = readArguments();

// 64-bit numbers as strings: a seed does not fit a JavaScript number. No defaults: a field left unset stays unset.
const definition = loadSync("tandem/v1/inference.proto", {
  includeDirs: [PROTOS],
  keepCase: true,
  longs: String,
  enums: String,
});
const { tandem } = grpc.loadPackageDefinition(definition);
const client = new tandem.v1.InferenceService(options.address, grpc.credentials.createInsecure());

const request = {
  ...(options.chat ? { messages: { messages: [{ role: "user", content: prompt }] } } : { text: prompt }),
  sampling: { max_tokens: Number(options["max-tokens"]) },
};
if (options.temperature !== undefined) request.sampling.temperature = Number(options.temperature);
if (options.seed !== undefined) request.sampling.seed = options.seed;

const metadata = new grpc.Metadata();
if (options.key) metadata.set("authorization", `Bearer ${options.key}`);
const stream = client.Generate(request, metadata, { deadline: Date.now() + Number(options.timeout) * 1000 });
process.once("SIGINT", () => stream.cancel()); // the workers drop the request at once

try {
  for await (const chunk of stream) {
    for (const output of chunk.outputs ?? []) process.stdout.write(output.text ?? "");
    if (chunk.usage) printEnd(chunk);
  }
} catch (error) {
  console.error(`${grpc.status[error.code] ?? "ERROR"}: ${error.details ?? error.message}`);
  process.exitCode = error.code === grpc.status.CANCELLED ? 130 : 1;
} finally {
  client.close();
}

// What the last message says about the request.
function printEnd({ usage, timings, receipt }) {
  const kilobytes = Number(receipt.handoff_bytes ?? 0) / 1000;
  console.error(
    `\n\n${usage.prompt_tokens} prompt tokens, ${usage.completion_tokens} generated; ` +
      `first token after ${(timings.first_token_s * 1000).toFixed(0)} ms, all after ${timings.total_s.toFixed(2)} s; ` +
      `${kilobytes.toFixed(0)} kB of KV handed over by ${receipt.transport ?? "nothing"}`,
  );
}
