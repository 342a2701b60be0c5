/** Naming one partition of a table: by its number, label, UUID or type. */

import { outOfRange, wrongType, wrongValue } from '../common/arguments.ts'
import { refusal } from '../errors/errors.ts'
import type { PartitionTable, TablePartition } from './disk.ts'

/**
 * One partition of a table: by its number, as in `/dev/loop0p2`; by its label, which is compared exactly; or by its
 * UUID or its type (a GUID, or `0x83`), which are compared without regard to case.
 */
export type PartitionRef = number | { readonly label: string } | { readonly uuid: string } | { readonly type: string }

const GUID = /^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i
/** The disk's id and the number of the partition, as the kernel makes a PARTUUID for an MBR. */
const MBR_UUID = /^[0-9a-f]{8}-[0-9a-f]{2}$/i
const MBR_TYPE = /^(?:0x)?([0-9a-f]{1,2})$/i

/** @throws TypeError, RangeError (number 0, a malformed UUID or type) */
export function checkPartitionRef(value: unknown): PartitionRef {
  if (typeof value === 'number') {
    if (Number.isInteger(value) && value >= 1 && value <= MAX_TABLE_NUMBER) return value
    throw outOfRange('partition', `a whole number from 1 to ${MAX_TABLE_NUMBER}`, value)
  }
  if (typeof value !== 'object' || value === null) {
    throw wrongType('partition', 'a number or an object with a label, a uuid or a type', value)
  }
  const given = Object.entries(value).filter(([, member]) => member !== undefined)
  const [name, text] = given[0] ?? []
  if (given.length !== 1 || (name !== 'label' && name !== 'uuid' && name !== 'type')) {
    throw wrongValue('partition', 'must have a label, a uuid or a type, and one of them only')
  }
  if (typeof text !== 'string') throw wrongType(`partition.${name}`, 'a string', text)
  if (name === 'label') {
    if (text === '') throw wrongValue('partition.label', 'must not be empty')
    return { label: text }
  }
  if (name === 'uuid') {
    if (GUID.test(text) || MBR_UUID.test(text)) return { uuid: text }
    throw outOfRange('partition.uuid', 'a UUID, or 1a2b3c4d-05 of an MBR', text)
  }
  if (GUID.test(text) || MBR_TYPE.test(text)) return { type: text }
  throw outOfRange('partition.type', 'a GUID, or 0x83 of an MBR', text)
}

/** The largest number that a partition of a GPT of {@link MAX_GPT_ENTRIES_BYTES} can have. */
const MAX_TABLE_NUMBER = 32_768

/**
 * The one partition of the table that the reference is about.
 *
 * @param path what the error calls the image or the device
 * @throws `no-such-partition` where none or several match, with what there is; also where there is no table
 */
export function findPartition(table: PartitionTable | undefined, ref: PartitionRef, path?: string): TablePartition {
  const there = table?.partitions ?? []
  const found = there.filter((partition) => matches(partition, ref))
  const [first] = found
  if (first !== undefined && found.length === 1) return first
  const what = describeRef(ref)
  if (found.length > 1) {
    const numbers = found.map(({ number }) => number).join(', ')
    throw refusal('no-such-partition', 'read', `partitions ${numbers} have ${what}`, {
      path,
      hint: 'name one of them by its number or its UUID',
    })
  }
  const detail = typeof ref === 'number' ? `there is no partition ${ref}` : `there is no partition with ${what}`
  throw refusal('no-such-partition', 'read', `${detail}: ${describeTable(table)}`, { path, hint: hintOf(table) })
}

function matches(partition: TablePartition, ref: PartitionRef): boolean {
  if (typeof ref === 'number') return partition.number === ref
  if ('label' in ref) return partition.label === ref.label
  if ('uuid' in ref) return partition.uuid?.toLowerCase() === ref.uuid.toLowerCase()
  const [, digits] = MBR_TYPE.exec(ref.type) ?? []
  const type = digits === undefined ? ref.type.toLowerCase() : Number.parseInt(digits, 16).toString(16)
  return partition.type?.toLowerCase() === type
}

function describeRef(ref: PartitionRef): string {
  if (typeof ref === 'number') return `the number ${ref}`
  const [name = '', text = ''] = Object.entries(ref)[0] ?? []
  return `the ${name === 'uuid' ? 'UUID' : name} ${JSON.stringify(text)}`
}

/** Enough of a long table to find the slip; the rest is counted. */
const SHOWN = 8

function describeTable(table: PartitionTable | undefined): string {
  if (table === undefined) return 'there is no partition table'
  const { partitions } = table
  if (partitions.length === 0) return 'the partition table is empty'
  const shown = partitions.slice(0, SHOWN).map(({ number, label, typeName, type }) => {
    return `${number} (${label === undefined ? (typeName ?? type) : JSON.stringify(label)})`
  })
  const rest = partitions.length - shown.length
  return `there are ${shown.join(', ')}${rest > 0 ? ` and ${rest} more` : ''}`
}

/** What is missing may be in the table, and have been left out. */
function hintOf(table: PartitionTable | undefined): string | undefined {
  const [first] = table?.warnings.filter(({ code }) => code === 'partition-left-out') ?? []
  return first?.message
}
