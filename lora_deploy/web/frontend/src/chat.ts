import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import type { Description, Message } from "./description";

/** The model's tokenizer and chat template. */
export class Chat {
  private readonly tokenizer: Tokenizer;
  private readonly template: Template | null;

  constructor(
    tokenizer: object,
    private readonly description: Description,
  ) {
    this.tokenizer = new Tokenizer(tokenizer, { clean_up_tokenization_spaces: false });
    this.template = description.chat_template === null ? null : new Template(description.chat_template);
  }

  /** A conversation as tokens, up to where the answer begins; without a template, the last message alone. */
  encode(messages: Message[]): number[] {
    if (this.template === null) return this.tokenizer.encode(messages[messages.length - 1].content).ids;
    const values = { messages, add_generation_prompt: true, tools: null, documents: null };
    const text = this.template.render({ ...values, ...this.description.special_tokens });
    return this.tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /** Tokens as text, as far as it is whole: a letter may be made of several tokens. */
  decode(tokens: number[], isWhole: boolean): string {
    const text = this.tokenizer.decode(tokens, { skip_special_tokens: true });
    return isWhole ? text : text.replace(/\uFFFD+$/, "");
  }
}
